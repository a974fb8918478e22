// The low-rank share of each token's adapters: Σ weight · B (A x), over the rank rows that it uses.
//
// A's rows carry their adapter's scaling. A pool holds a part's A as (layers, in / 2, rows, 2), and the B of all of its
// modules as (layers, its numbers of B), each module's as (out / 32, rank / 2, 32, 2) from the module's offset on: what
// vdpbf16ps and AMX multiply by, and what one task or a tile of outputs needs lies together. A x, times the weight, is
// rounded to 16 bits.
#pragma once
#include <algorithm>
#include <vector>

#include "products.h"

// The products with A of one group in one layer, and where each token finds its own.
class LoraGroup {
  public:
    void plan(const LoraPool& pool, const LoraModule* modules, const LoraSegment* segments, int num_segments,
              const double* weights) {
        pool_ = pool, weights_ = weights;
        pieces_.clear();
        for (Section& section : sections_) section.shares.clear();
        int size = 0;
        for (int index = 0; index < num_segments; index++) {
            const LoraSegment& segment = segments[index];
            if (segment.start == segment.stop) continue;
            int width = 0;  // products with A of each of its tokens
            for (int64_t i = 0; i < segment.num_parts; i++) width += (int)pool.parts[segment.first_part + i].num_rows;
            int hidden = size;
            for (int64_t i = segment.first_part; i < segment.first_part + segment.num_parts; i++) {
                const LoraPart& part = pool.parts[i];
                for (int64_t k = part.first_module; k < part.first_module + part.num_modules; k++)
                    section_of(modules[k])
                        .shares.push_back({(int)segment.start, (int)segment.stop, hidden + (int)modules[k].row, width,
                                           (int)(modules[k].rank / 2),
                                           pool.b + part.b_offset * pool.layers + modules[k].offset, part.b_size});
                add_pieces(segment, (int)i, hidden, width);
                hidden += (int)part.num_rows;
            }
            size += width * (int)(segment.stop - segment.start);
        }
        hidden_.resize(size);
        make_tasks();
        find_used();
    }

    int num_tasks() const { return (int)tasks_.size(); }

    // hidden = weight · A x for the tokens and rows of one task; x (tokens, in).
    void shrink(int layer, int index, const bf16* x) {
        const int first = tasks_[index],
                  count = (index + 1 < num_tasks() ? tasks_[index + 1] : (int)pieces_.size()) - first;
        const Piece& piece = pieces_[first];
        const int pairs = (int)pool_.in / 2, vectors = (piece.rows + 15) / 16;
        alignas(64) float y[kShrinkTokens * kShrinkVectors * 16];
        const bf16 *of_x[kOwnTokens], *of_a[kOwnTokens];
        for (int i = 0; i < count; i++) {
            const Piece& of = pieces_[first + i];
            of_x[i] = x + of.token * pool_.in;
            of_a[i] = a_of(pool_.parts[of.part], layer) + 2 * of.row;
        }
        const size_t rows = pool_.parts[piece.part].num_rows;
        if (count > 1)
            multiply_own_rows(of_x, of_a, count, rows, piece.rows, pairs, y);
        else if (has_amx())
            multiply_rows_amx(of_x[0], pool_.in, piece.tokens, of_a[0], rows, piece.rows, pairs, y);
        else
            (vectors == 1   ? multiply_rows<1>
             : vectors == 2 ? multiply_rows<2>
                            : multiply_rows<3>)(of_x[0], pool_.in, piece.tokens, of_a[0], rows, piece.rows, pairs, y);
        const float* sums = y;
        for (int i = 0; i < count; i++)
            for (int token = 0; token < pieces_[first + i].tokens; token++, sums += kShrinkVectors * 16)
                put(pieces_[first + i], token, sums);
    }

    // Calls visit(first token, tokens, hidden, its stride, B's tile, its pairs) for each share of the tokens
    // [start, start + rows) in the outputs [column, column + 32) of the group, all of one module.
    template <class Visit>
    void for_shares(int layer, int start, int rows, int column, Visit visit) const {
        for (const Section& section : sections_) {
            if (column < section.start || column >= section.stop) continue;
            auto share = std::upper_bound(section.shares.begin(), section.shares.end(), start,
                                          [](int token, const Share& of) { return token < of.stop; });
            for (; share != section.shares.end() && share->start < start + rows; share++) {
                const int first = std::max(share->start, start), stop = std::min(share->stop, start + rows);
                visit(first, stop - first, &hidden_[share->hidden + (size_t)(first - share->start) * share->width],
                      share->width,
                      share->b + layer * share->b_size + (int64_t)(column - section.start) * 2 * share->pairs,
                      share->pairs);
            }
        }
    }

    // Adds the shares to y (rows, 32), once all tasks are done.
    void expand(int layer, int start, int rows, int column, float* y, size_t y_stride) const {
        const FlushesToZero flushes;
        AmxSums sums;
        for_shares(layer, start, rows, column,
                   [&](int first, int count, const bf16* hidden, int width, const bf16* b, int pairs) {
                       float* to = y + (first - start) * y_stride;
                       if (!has_amx()) return multiply<true>(hidden, width, count, b, pairs, to, y_stride);
                       for (int row = 0; row < count; row += 2 * kAmxRows)
                           add_by_amx(sums, hidden + row * width, width, std::min(count - row, 2 * kAmxRows), b, pairs,
                                      to + row * y_stride, y_stride);
                   });
        sums.store();
    }

    // What `expand` reads of B.
    void prefetch_b(int layer, int start, int rows, int column, PrefetchList& prefetch) const {
        for_shares(layer, start, rows, column, [&](int, int, const bf16*, int, const bf16* b, int pairs) {
            prefetch.add(b, pairs * 2 * kTile * sizeof(bf16));
        });
    }

    // One of `count` like shares of what all tasks read of A.
    void prefetch_a(int layer, int64_t index, int64_t count, PrefetchList& prefetch) const {
        int64_t row = used_rows_ * index / count;
        const int64_t stop = used_rows_ * (index + 1) / count;
        auto part = std::upper_bound(used_.begin(), used_.end(), row,
                                     [](int64_t of, const Used& candidate) { return of < candidate.end; });
        for (; row < stop; part++) {
            const int64_t now = std::min(stop, part->end) - row, first = row - (part->end - part->num_rows);
            prefetch.add(a_of(*part, layer) + first * pool_.in, now * pool_.in * sizeof(bf16));
            row += now;
        }
    }

  private:
    static constexpr int kFewTokens = 8;  // up to which AMX isn't worth its beginning
    struct Piece {  // tokens [token, token + tokens) times the rows [row, row + rows) of a part's A, to `hidden` on
        int token, tokens, part, row, rows, hidden, width;
    };
    struct Share {  // tokens [start, stop), each with `width` products with A, and a module's B
        int start, stop, hidden, width, pairs;
        const bf16* b;  // of the first layer
        int64_t b_size;
    };
    struct Section {  // outputs [start, stop) of a module, and the shares of them in their tokens' order
        int start, stop;
        std::vector<Share> shares;
    };
    struct Used {  // a part of A that somebody uses; `end`: its rows and those of all before it
        int64_t first_row, num_rows, end;
    };

    // The sums of up to 32 rows in AMX's registers, whose shape changes as seldom as it may.
    class AmxSums {
      public:
        void add(float* y, size_t y_stride, const bf16* hidden, size_t stride, int rows, const bf16* b, int pairs) {
            for (int pair = 0; pair < pairs; pair += kAmxPairs) {
                const int now = std::min(pairs - pair, kAmxPairs);
                if (y != y_ || rows != rows_ || now != pairs_) store();
                if (rows != rows_ || now != pairs_) block_.emplace(rows_ = rows, pairs_ = now);
                if (y_ == nullptr) block_->load(y_ = y, y_stride_ = y_stride);
                const bf16* of = b + (size_t)pair * 2 * kTile;
                block_->add(hidden + 2 * pair, stride, of, of + kTile, 2 * kTile);
            }
        }
        void store() {
            if (y_ != nullptr) block_->store(y_, y_stride_);
            y_ = nullptr;
        }

      private:
        std::optional<AmxBlock> block_;
        int rows_ = 0, pairs_ = 0;
        float* y_ = nullptr;
        size_t y_stride_ = 0;
    };

    static void add_by_amx(AmxSums& sums, const bf16* hidden, int width, int rows, const bf16* b, int pairs, float* y,
                           size_t y_stride) {
        if (rows > kFewTokens) return sums.add(y, y_stride, hidden, width, rows, b, pairs);
        sums.store();
        for (int row = 0; row < rows; row++) expand_as_amx(hidden + row * width, b, pairs, y + row * y_stride);
    }

    Section& section_of(const LoraModule& module) {
        const int start = (int)module.out_start, stop = (int)(module.out_start + module.out_features);
        for (Section& section : sections_)
            if (section.start == start && section.stop == stop) return section;
        return sections_.emplace_back(Section{start, stop, {}});
    }

    void add_pieces(const LoraSegment& segment, int part, int hidden, int width) {
        constexpr int kMost = kShrinkVectors * 16;
        const int num_rows = (int)pool_.parts[part].num_rows, start = (int)segment.start, stop = (int)segment.stop;
        for (int token = start; token < stop; token += kShrinkTokens)
            for (int row = 0; row < num_rows; row += kMost)
                pieces_.push_back({token, std::min(stop - token, kShrinkTokens), part, row,
                                   std::min(num_rows - row, kMost), hidden + (token - start) * width + row, width});
    }

    // A piece is a task, but for those of single tokens: some like ones are done together, as long as there are two
    // tasks at least.
    void make_tasks() {
        tasks_.clear();
        const size_t most = has_amx() ? 1 : std::clamp<size_t>(pieces_.size() / 2, 1, kOwnTokens);
        for (size_t i = 0; i < pieces_.size(); i++) {
            const Piece* first = tasks_.empty() ? nullptr : &pieces_[tasks_.back()];
            if (first == nullptr || i - tasks_.back() == most || first->tokens > 1 || pieces_[i].tokens > 1 ||
                first->rows != pieces_[i].rows ||
                pool_.parts[first->part].num_rows != pool_.parts[pieces_[i].part].num_rows)
                tasks_.push_back((int)i);
        }
    }

    // A part's A: `Part` may be what is known of it in `Used`.
    template <class Part>
    const bf16* a_of(const Part& part, int layer) const {
        return pool_.a + (part.first_row * pool_.layers + layer * part.num_rows) * pool_.in;
    }

    void find_used() {
        used_.clear(), used_rows_ = 0;
        for (const Piece& piece : pieces_)
            used_.push_back({pool_.parts[piece.part].first_row, pool_.parts[piece.part].num_rows, 0});
        std::sort(used_.begin(), used_.end(), [](const Used& a, const Used& b) { return a.first_row < b.first_row; });
        auto is_same = [](const Used& a, const Used& b) { return a.first_row == b.first_row; };
        used_.erase(std::unique(used_.begin(), used_.end(), is_same), used_.end());
        for (Used& part : used_) part.end = used_rows_ += part.num_rows;
    }

    // Rounds a token's sums, times the weight, into its place.
    void put(const Piece& piece, int token, const float* sums) {
        const F32x16 weight = broadcast((float)weights_[piece.part]);
        for (int row = 0; row < piece.rows; row += 16)
            store_lanes(&hidden_[piece.hidden + token * piece.width + row], first_lanes(piece.rows - row),
                        to_bf16(weight * load(sums + row)));
    }

    LoraPool pool_{};
    const double* weights_ = nullptr;
    std::vector<Piece> pieces_;
    std::vector<int> tasks_;  // the first piece of each
    std::vector<Section> sections_;
    std::vector<Used> used_;
    int64_t used_rows_ = 0;
    std::vector<bf16> hidden_;
};

// The groups of all modules in a step, with or without adapters.
class LoraGroups {
  public:
    void plan(const ServeStep& step) {
        layers_ = (int)step.pools[0].layers, has_adapters_ = step.num_segments > 0;
        for (int i = 0; i < kGroups; i++)
            groups_[i].plan(step.pools[i], step.modules, step.segments, (int)step.num_segments, step.weights);
    }

    // From here on, behind a layer's keys and values, the tokens are those that are wanted of each run.
    void keep_wanted(const ServeStep& step) {
        if (!has_adapters_) return;
        const ServeRun *run = step.runs, *end = step.runs + step.num_runs;
        int64_t before = 0;                // wanted tokens of the runs before `run`
        auto place = [&](int64_t token) {  // of the first wanted one from `token` on; asked in order
            for (; run < end && run->stop <= token; run++) before += run->num_wanted;
            return run == end ? before : before + std::max<int64_t>(0, token - (run->stop - run->num_wanted));
        };
        wanted_.assign(step.segments, step.segments + step.num_segments);
        for (LoraSegment& segment : wanted_) segment.start = place(segment.start), segment.stop = place(segment.stop);
        for (int i = kQkv + 1; i < kGroups; i++)
            groups_[i].plan(step.pools[i], step.modules, wanted_.data(), (int)wanted_.size(), step.weights);
    }
    LoraGroup& operator[](int group) { return groups_[group]; }

    // For one of `count` like items of a group's product: what it reads of B, and its part of the A's that the next
    // group's product begins with.
    void add_to(PrefetchList& prefetch, int layer, int group, int start, int rows, int column, int index,
                int count) const {
        if (!has_adapters_) return;
        const int next = group + 1, next_layer = layer + next / kGroups;
        groups_[group].prefetch_b(layer, start, rows, column, prefetch);
        if (next_layer < layers_) groups_[next % kGroups].prefetch_a(next_layer, index, count, prefetch);
    }

  private:
    int layers_ = 0;
    bool has_adapters_ = false;
    LoraGroup groups_[kGroups];
    std::vector<LoraSegment> wanted_;
};
