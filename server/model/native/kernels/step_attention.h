// The attention of a serving step's tokens, and how threads share it.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "attention.h"
#include "team.h"

constexpr int kSplitFrom = 2048;  // positions; splitting shorter items has no measurable gain
constexpr int kFewItems = 8;      // items per thread; with more, a thread waits only briefly for the last ones

struct Query {  // the step's tokens [start, stop), of one sequence, the first at `position`
    int start, stop, position;
    const int32_t* blocks;

    int length() const { return position + stop - start; }  // positions that its last token sees
};

// How threads share items. Each thread takes the same number of whole items. The items that are left over, which are
// the first and longest ones, are split: their scores by position, into one part per thread, and their outputs by tiles
// of dimensions. Splitting an item changes none of its numbers.
class AttentionSplit {
  public:
    struct Part {
        int item, part;  // part -1: the whole item
    };

    // The first item sees `length` positions. An item has `tiles`.
    void plan(int items, int length, int tiles, int threads) {
        num_split_ = length >= kSplitFrom && items < kFewItems * threads ? items % threads : 0;
        items_ = items;
        tiles_ = tiles;
        threads_ = threads;
    }

    int num_split() const { return num_split_; }
    int parts() const { return threads_; }  // of a split item's scores
    // The parts of all split items' scores, which are computed first.
    int num_scored() const { return num_split_ * threads_; }
    Part scored(int i) const { return {i / threads_, i % threads_}; }
    // Whole items, and the split items' tiles, which need those scores.
    int num_mixed() const { return items_ - num_split_ + num_split_ * tiles_; }
    // A thread begins with neighbouring indices (team.h). They are whole items here, while scores are computed.
    Part mixed(int i) const {
        if (num_split_ == 0) return {i, -1};
        const int count = num_mixed(), thread = ((i + 1) * threads_ - 1) / count, begin = count * thread / threads_;
        const int items_per_thread = (items_ - num_split_) / threads_, index = i - begin;
        if (index < items_per_thread) return {num_split_ + thread * items_per_thread + index, -1};
        const int tile = begin - thread * items_per_thread + index - items_per_thread;
        return {tile / tiles_, tile % tiles_};
    }

  private:
    int num_split_ = 0, items_ = 0, tiles_ = 1, threads_ = 1;
};

// An item is a query and a kv head.
class StepAttention {
  public:
    StepAttention(int heads, int max_threads) : heads_(heads), scratch_(max_threads) {}

    // Plans the runs until the next call. There is at least one query; the caller keeps the queries. The cache may be
    // any layer's.
    void plan(const std::vector<Query>& queries, const CacheView& cache, int threads) {
        queries_ = &queries;
        items_ = static_cast<int>(queries.size()) * cache.kv_heads;
        split_.plan(items_, attention_of(0, cache).length(), cache.head_dim / kTile, threads);
        if (scores_.size() < static_cast<size_t>(split_.num_split())) scores_.resize(split_.num_split());
        for (int item = 0; item < split_.num_split(); item++) {
            const Attention attention = attention_of(item, cache);
            room(scores_[item], static_cast<size_t>(attention.rows) * attention.width());
        }
    }

    // A phase of the team: the attention of one layer. out and q are (tokens, heads, head_dim).
    void run(Team& team, const CacheView& cache, const bf16* q, bf16* out) {
        auto score = [&](int i) {
            const auto [item, part] = split_.scored(i);
            const Attention attention = attention_of(item, cache);
            const int pairs = (attention.count() + 1) / 2, parts = split_.parts();
            attention.score(gather_queries(item, attention, q),
                            attention.pieces(next_keys(item, cache), scratch().attention), pairs * part / parts * 2,
                            std::min(pairs * (part + 1) / parts * 2, attention.count()), scores_[item].data());
        };
        auto mix = [&](int i) {
            const auto [item, tile] = split_.mixed(i);
            const Attention attention = attention_of(item, cache);
            const int dim = cache.head_dim;
            float* mixed = room(scratch().out, static_cast<size_t>(attention.rows) * dim);
            int first_dim = 0, last_dim = dim;
            if (tile < 0) {
                attend(attention, gather_queries(item, attention, q), next_keys(item, cache), mixed,
                       scratch().attention);
            } else {
                first_dim = tile * kTile;
                last_dim = first_dim + kTile;
                const bf16* const* pieces = attention.pieces(next_keys(item, cache), scratch().attention);
                team.wait_first(split_.num_scored());
                attention.mix(scores_[item].data(), pieces, first_dim, last_dim, mixed, scratch().attention);
            }
            for (int row = 0; row < attention.rows; row++)
                for (int d = first_dim; d < last_dim; d += 16)
                    store_bf16(&out[offset(item, attention, row) + d], load(mixed + row * dim + d));
        };
        team.each(split_.num_scored(), score, split_.num_mixed(), mix);
    }

  private:
    struct alignas(64) Scratch {  // one thread's
        AttentionScratch attention;
        std::vector<bf16> q;
        std::vector<float> out;
    };
    Scratch& scratch() { return scratch_[Team::number()]; }

    const Query& query(int item, int kv_heads) const {
        return (*queries_)[queries_->size() - 1 - item / kv_heads];  // the longest first
    }
    Attention attention_of(int item, const CacheView& cache) const {
        const Query& query = this->query(item, cache.kv_heads);
        const int group = heads_ / cache.kv_heads;
        return {cache, query.blocks, item % cache.kv_heads, (query.stop - query.start) * group, group, query.position};
    }
    // The keys that the item's thread usually reads next.
    NextKeys next_keys(int item, const CacheView& cache) const {
        const Attention next = attention_of(std::min(item + 1, items_ - 1), cache);
        return {next.blocks, next.count(), next.kv_head};
    }
    // Where an item's row begins in q and out.
    size_t offset(int item, const Attention& attention, int row) const {
        const size_t token = query(item, attention.cache.kv_heads).start + row / attention.group;
        const int head = attention.kv_head * attention.group + row % attention.group;
        return (token * heads_ + head) * attention.cache.head_dim;
    }
    // Copies an item's rows of q next to each other.
    const bf16* gather_queries(int item, const Attention& attention, const bf16* q) {
        const int dim = attention.cache.head_dim;
        bf16* rows = room(scratch().q, static_cast<size_t>(attention.rows) * dim);
        for (int row = 0; row < attention.rows; row++)
            memcpy(&rows[row * dim], &q[offset(item, attention, row)], dim * sizeof(bf16));
        return rows;
    }

    const int heads_;
    int items_ = 0;
    const std::vector<Query>* queries_ = nullptr;
    AttentionSplit split_;
    std::vector<std::vector<float>> scores_;  // one per split item; kept so that later steps needn't allocate
    std::vector<Scratch> scratch_;
};
