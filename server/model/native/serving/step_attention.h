// The attention of a step's tokens, and how threads share it.
#pragma once
#include <algorithm>
#include <vector>

#include "kernels/attention.h"
#include "kernels/team.h"
#include "tokens.h"

namespace {

constexpr int kSplitFrom = 2048;  // positions; shorter items gain nothing that could be seen
constexpr int kFewItems = 8;      // a thread's; with more of them a thread waits for the last ones too briefly

// Items are whole, a thread's each, but for those that are left over where each thread has had as many: the first ones,
// the longest. Their scores are computed in parts by position, as many as threads, and what they mix by tiles of
// dimensions. Their numbers are the same then.
class AttentionSplit {
  public:
    struct Part {
        int item, part;  // -1: all of it
    };

    // The first item sees `length` positions. `tiles` of an item.
    void plan(int items, int length, int tiles, int threads) {
        num_split_ = length >= kSplitFrom && items < kFewItems * threads ? items % threads : 0;
        items_ = items, tiles_ = tiles, threads_ = threads;
    }

    int num_split() const { return num_split_; }
    int parts() const { return threads_; }  // of a split item's scores
    // Parts of scores, which come first.
    int num_scored() const { return num_split_ * threads_; }
    Part scored(int i) const { return {i / threads_, i % threads_}; }
    // Whole items, and tiles of the split ones, once their scores are there.
    int num_mixed() const { return items_ - num_split_ + num_split_ * tiles_; }
    // A thread begins with neighbours (team.h): with whole items, here, as scores may have to be waited for.
    Part mixed(int i) const {
        if (num_split_ == 0) return {i, -1};
        const int count = num_mixed(), thread = ((i + 1) * threads_ - 1) / count, begin = count * thread / threads_;
        const int each = (items_ - num_split_) / threads_, at = i - begin;
        if (at < each) return {num_split_ + thread * each + at, -1};
        const int tile = begin - thread * each + at - each;
        return {tile / tiles_, tile % tiles_};
    }

  private:
    int num_split_ = 0, items_ = 0, tiles_ = 1, threads_ = 1;
};

// An item is a query's (tokens.h), of one kv head.
class StepAttention {
  public:
    // Of `heads`, for at most `threads`.
    StepAttention(int heads, int threads) : heads_(heads), scratch_(threads) {}

    // For these queries, at least one, which must outlive its runs, until the next call. The cache is any layer's.
    // `threads` share them.
    void plan(const std::vector<Query>& queries, const CacheView& cache, int threads) {
        queries_ = &queries;
        items_ = (int)queries.size() * cache.kv_heads;
        split_.plan(items_, rows(0, cache).length(), cache.head_dim / kTile, threads);
        if (scores_.size() < (size_t)split_.num_split()) scores_.resize(split_.num_split());
        for (int item = 0; item < split_.num_split(); item++) {
            const Attention of = rows(item, cache);
            room(scores_[item], (size_t)of.rows * of.width());
        }
    }

    // A phase of the team's: out, like q (tokens, heads, head_dim), of a layer's queries.
    void run(Team& team, const CacheView& cache, const bf16* q, bf16* out) {
        const int dim = cache.head_dim;
        team.each(
            split_.num_scored(),
            [&](int i) {
                const auto [item, part] = split_.scored(i);
                const Attention of = rows(item, cache);
                const int pairs = (of.count() + 1) / 2, parts = split_.parts();
                of.score(queries_of(item, of, q), of.pieces(next(item, cache), scratch().attention),
                         pairs * part / parts * 2, std::min(pairs * (part + 1) / parts * 2, of.count()),
                         scores_[item].data());
            },
            split_.num_mixed(),
            [&](int i) {
                const auto [item, tile] = split_.mixed(i);
                const Attention of = rows(item, cache);
                float* mixed = room(scratch().out, (size_t)of.rows * dim);
                int from = 0, to = dim;
                if (tile < 0) {
                    attend(of, queries_of(item, of, q), next(item, cache), mixed, scratch().attention);
                } else {
                    from = tile * kTile, to = from + kTile;
                    const bf16* const* pieces = of.pieces(next(item, cache), scratch().attention);
                    team.wait_first(split_.num_scored());
                    of.mix(scores_[item].data(), pieces, from, to, mixed, scratch().attention);
                }
                for (int row = 0; row < of.rows; row++)
                    for (int d = from; d < to; d += 16)
                        store_bf16(&out[first(item, of, row) + d], _mm512_loadu_ps(mixed + row * dim + d));
            });
    }

  private:
    struct alignas(64) Scratch {  // of one thread
        AttentionScratch attention;
        std::vector<bf16> q;
        std::vector<float> out;
    };
    Scratch& scratch() { return scratch_[Team::number()]; }

    const Query& query(int item, int kv_heads) const {
        return (*queries_)[queries_->size() - 1 - item / kv_heads];  // the longest first
    }
    Attention rows(int item, const CacheView& cache) const {
        const Query& of = query(item, cache.kv_heads);
        const int group = heads_ / cache.kv_heads;
        return {cache, of.blocks, item % cache.kv_heads, (of.stop - of.start) * group, group, of.position};
    }
    // The keys of what the item's thread has after it, most of the time.
    NextKeys next(int item, const CacheView& cache) const {
        const Attention after = rows(std::min(item + 1, items_ - 1), cache);
        return {after.blocks, after.count(), after.kv_head};
    }
    // Where an item's row begins, in q and out.
    size_t first(int item, const Attention& of, int row) const {
        const int token = query(item, of.cache.kv_heads).start + row / of.group;
        return ((size_t)token * heads_ + of.kv_head * of.group + row % of.group) * of.cache.head_dim;
    }
    // An item's rows of q, one after the other.
    const bf16* queries_of(int item, const Attention& of, const bf16* q) {
        const int dim = of.cache.head_dim;
        bf16* found = room(scratch().q, (size_t)of.rows * dim);
        for (int row = 0; row < of.rows; row++) memcpy(&found[row * dim], &q[first(item, of, row)], dim * sizeof(bf16));
        return found;
    }

    const int heads_;
    int items_ = 0;
    const std::vector<Query>* queries_ = nullptr;
    AttentionSplit split_;
    std::vector<std::vector<float>> scores_;  // of the items that are split; room that is kept for the next ones
    std::vector<Scratch> scratch_;
};

}  // namespace
