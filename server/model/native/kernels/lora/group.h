// Each token's low-rank share Σ weight · B (A x) over the parts of its segment.
//
// A's rows include their adapter's scaling. A pool stores a part's A as (layers, in / 2, rows, 2), and the B of all of
// its modules as (layers, numbers of B). A module's B is (out / 32, rank / 2, 32, 2) from the module's offset on. So
// the operands of vdpbf16ps and AMX are contiguous, and so is everything that one task or one tile of outputs reads.
// weight · A x is rounded to bf16.
#pragma once
#include <algorithm>
#include <vector>

#include "products.h"

// One group's products with A and B in one layer.
class LoraGroup {
  public:
    void plan(const LoraPool& pool, const LoraModule* modules, const LoraSegment* segments, int num_segments,
              const double* weights) {
        pool_ = pool;
        weights_ = weights;
        pieces_.clear();
        for (Section& section : sections_) section.shares.clear();
        int size = 0;
        for (int index = 0; index < num_segments; index++) {
            const LoraSegment& segment = segments[index];
            if (segment.start == segment.stop) continue;
            int width = 0;  // rows of A per token, of all parts
            for (int64_t i = 0; i < segment.num_parts; i++)
                width += static_cast<int>(pool.parts[segment.first_part + i].num_rows);
            int hidden = size;
            for (int64_t i = segment.first_part; i < segment.first_part + segment.num_parts; i++) {
                const LoraPart& part = pool.parts[i];
                for (int64_t k = part.first_module; k < part.first_module + part.num_modules; k++) {
                    const LoraModule& module = modules[k];
                    section_of(module).shares.push_back(
                        {static_cast<int>(segment.start), static_cast<int>(segment.stop),
                         hidden + static_cast<int>(module.row), width, static_cast<int>(module.rank / 2),
                         pool.b + part.b_offset * pool.layers + module.offset, part.b_size});
                }
                add_pieces(segment, static_cast<int>(i), hidden, width);
                hidden += static_cast<int>(part.num_rows);
            }
            size += width * static_cast<int>(segment.stop - segment.start);
        }
        hidden_.resize(size);
        make_tasks();
        find_used();
    }

    int num_tasks() const { return static_cast<int>(tasks_.size()); }

    // Computes hidden = weight · A x for the tokens and rows of one task; x is (tokens, in).
    void shrink(int layer, int index, const bf16* x) {
        const int first = tasks_[index];
        const int stop = index + 1 < num_tasks() ? tasks_[index + 1] : static_cast<int>(pieces_.size());
        const int count = stop - first;
        const Piece& piece = pieces_[first];
        const int pairs = static_cast<int>(pool_.in) / 2, vectors = (piece.rows + 15) / 16;
        alignas(64) float y[kShrinkTokens * kShrinkVectors * 16];
        const bf16 *own_x[kOwnTokens], *own_a[kOwnTokens];
        for (int i = 0; i < count; i++) {
            const Piece& own = pieces_[first + i];
            own_x[i] = x + own.token * pool_.in;
            own_a[i] = a_of(pool_.parts[own.part], layer) + 2 * own.row;
        }
        const size_t rows = pool_.parts[piece.part].num_rows;
        if (count > 1)
            multiply_own_rows(own_x, own_a, count, rows, piece.rows, pairs, y);
        else if (has_amx())
            multiply_rows_amx(own_x[0], pool_.in, piece.tokens, own_a[0], rows, piece.rows, pairs, y);
        else
            (vectors == 1   ? multiply_rows<1>
             : vectors == 2 ? multiply_rows<2>
                            : multiply_rows<3>)(own_x[0], pool_.in, piece.tokens, own_a[0], rows, piece.rows, pairs, y);
        const float* sums = y;
        for (int i = 0; i < count; i++)
            for (int token = 0; token < pieces_[first + i].tokens; token++, sums += kShrinkVectors * 16)
                store_hidden(pieces_[first + i], token, sums);
    }

    // Calls visit(first token, number of tokens, hidden, hidden's stride, B's tile, pairs) for each share of the tokens
    // [start, start + rows) in the outputs [column, column + 32), which belong to one module.
    template <class Visit>
    void for_shares(int layer, int start, int rows, int column, Visit visit) const {
        for (const Section& section : sections_) {
            if (column < section.start || column >= section.stop) continue;
            auto share = std::upper_bound(section.shares.begin(), section.shares.end(), start,
                                          [](int token, const Share& other) { return token < other.stop; });
            for (; share != section.shares.end() && share->start < start + rows; share++) {
                const int first = std::max(share->start, start), stop = std::min(share->stop, start + rows);
                visit(
                    first, stop - first,
                    &hidden_[share->hidden + static_cast<size_t>(first - share->start) * share->width], share->width,
                    share->b + layer * share->b_size + static_cast<int64_t>(column - section.start) * 2 * share->pairs,
                    share->pairs);
            }
        }
    }

    // Adds the shares to y (rows, 32). All tasks must be done.
    void expand(int layer, int start, int rows, int column, float* y, size_t y_stride) const {
        const FlushesToZero flushes;
        AmxSums sums;
        for_shares(layer, start, rows, column,
                   [&](int first, int count, const bf16* hidden, int width, const bf16* b, int pairs) {
                       float* sums_of_share = y + (first - start) * y_stride;
                       if (!has_amx()) return multiply<true>(hidden, width, count, b, pairs, sums_of_share, y_stride);
                       for (int row = 0; row < count; row += 2 * kAmxRows)
                           add_by_amx(sums, hidden + row * width, width, std::min(count - row, 2 * kAmxRows), b, pairs,
                                      sums_of_share + row * y_stride, y_stride);
                   });
        sums.store();
    }

    // Adds what `expand` reads of B to `prefetch`.
    void prefetch_b(int layer, int start, int rows, int column, PrefetchList& prefetch) const {
        for_shares(layer, start, rows, column, [&](int, int, const bf16*, int, const bf16* b, int pairs) {
            prefetch.add(b, pairs * 2 * kTile * sizeof(bf16));
        });
    }

    // Adds share `index` of `count` equal shares of what all tasks read of A.
    void prefetch_a(int layer, int64_t index, int64_t count, PrefetchList& prefetch) const {
        int64_t row = used_rows_ * index / count;
        const int64_t stop = used_rows_ * (index + 1) / count;
        auto part = std::upper_bound(used_.begin(), used_.end(), row,
                                     [](int64_t row, const UsedPart& other) { return row < other.end; });
        for (; row < stop; part++) {
            const int64_t count_now = std::min(stop, part->end) - row;
            const int64_t first = row - (part->end - part->num_rows);
            prefetch.add(a_of(*part, layer) + first * pool_.in, count_now * pool_.in * sizeof(bf16));
            row += count_now;
        }
    }

  private:
    static constexpr int kFewTokens = 8;  // at most this many tokens: configuring AMX would take too long
    struct Piece {  // tokens [token, token + tokens) times rows [row, row + rows) of a part's A, to hidden_[hidden]
        int token, tokens, part, row, rows, hidden, width;
    };
    struct Share {  // a module's B for the tokens [start, stop), whose rows of hidden_ begin at `hidden`
        int start, stop, hidden, width, pairs;
        const bf16* b;  // the first layer's
        int64_t b_size;
    };
    struct Section {  // a module's outputs [start, stop), and their shares in the order of tokens
        int start, stop;
        std::vector<Share> shares;
    };
    struct UsedPart {  // a part's rows of A that the step reads; `end` counts its rows and all before them
        int64_t first_row, num_rows, end;
    };

    // The sums of up to 32 rows in AMX's registers. They stay there, and the registers' shape is kept, as long as
    // possible.
    class AmxSums {
      public:
        void add(float* y, size_t y_stride, const bf16* hidden, size_t stride, int rows, const bf16* b, int pairs) {
            for (int pair = 0; pair < pairs; pair += kAmxPairs) {
                const int count = std::min(pairs - pair, kAmxPairs);
                if (y != y_ || rows != rows_ || count != pairs_) store();
                if (rows != rows_ || count != pairs_) block_.emplace(rows_ = rows, pairs_ = count);
                if (y_ == nullptr) block_->load(y_ = y, y_stride_ = y_stride);
                const bf16* b_pairs = b + static_cast<size_t>(pair) * 2 * kTile;
                block_->add(hidden + 2 * pair, stride, b_pairs, b_pairs + kTile, 2 * kTile);
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
        const int start = static_cast<int>(module.out_start),
                  stop = static_cast<int>(module.out_start + module.out_features);
        for (Section& section : sections_)
            if (section.start == start && section.stop == stop) return section;
        return sections_.emplace_back(Section{start, stop, {}});
    }

    void add_pieces(const LoraSegment& segment, int part, int hidden, int width) {
        constexpr int kMaxRows = kShrinkVectors * 16;
        const int num_rows = static_cast<int>(pool_.parts[part].num_rows), start = static_cast<int>(segment.start),
                  stop = static_cast<int>(segment.stop);
        for (int token = start; token < stop; token += kShrinkTokens)
            for (int row = 0; row < num_rows; row += kMaxRows)
                pieces_.push_back({token, std::min(stop - token, kShrinkTokens), part, row,
                                   std::min(num_rows - row, kMaxRows), hidden + (token - start) * width + row, width});
    }

    // Makes each piece a task. Up to kOwnTokens neighbouring pieces of single tokens with equal shapes share a task, if
    // at least two tasks remain.
    void make_tasks() {
        tasks_.clear();
        const size_t max_pieces = has_amx() ? 1 : std::clamp<size_t>(pieces_.size() / 2, 1, kOwnTokens);
        for (size_t i = 0; i < pieces_.size(); i++) {
            const Piece* first = tasks_.empty() ? nullptr : &pieces_[tasks_.back()];
            if (first == nullptr || i - tasks_.back() == max_pieces || first->tokens > 1 || pieces_[i].tokens > 1 ||
                first->rows != pieces_[i].rows ||
                pool_.parts[first->part].num_rows != pool_.parts[pieces_[i].part].num_rows)
                tasks_.push_back(static_cast<int>(i));
        }
    }

    // The address of a layer's A; `Part` is LoraPart or UsedPart.
    template <class Part>
    const bf16* a_of(const Part& part, int layer) const {
        return pool_.a + (part.first_row * pool_.layers + layer * part.num_rows) * pool_.in;
    }

    void find_used() {
        used_.clear();
        used_rows_ = 0;
        for (const Piece& piece : pieces_)
            used_.push_back({pool_.parts[piece.part].first_row, pool_.parts[piece.part].num_rows, 0});
        std::sort(used_.begin(), used_.end(),
                  [](const UsedPart& a, const UsedPart& b) { return a.first_row < b.first_row; });
        auto is_same = [](const UsedPart& a, const UsedPart& b) { return a.first_row == b.first_row; };
        used_.erase(std::unique(used_.begin(), used_.end(), is_same), used_.end());
        for (UsedPart& part : used_) part.end = used_rows_ += part.num_rows;
    }

    // Stores a token's sums, times the part's weight, into hidden_.
    void store_hidden(const Piece& piece, int token, const float* sums) {
        const F32x16 weight = broadcast(static_cast<float>(weights_[piece.part]));
        for (int row = 0; row < piece.rows; row += 16)
            store_lanes(&hidden_[piece.hidden + token * piece.width + row], first_lanes(piece.rows - row),
                        to_bf16(weight * load(sums + row)));
    }

    LoraPool pool_{};
    const double* weights_ = nullptr;
    std::vector<Piece> pieces_;
    std::vector<int> tasks_;  // each task's first piece
    std::vector<Section> sections_;
    std::vector<UsedPart> used_;
    int64_t used_rows_ = 0;
    std::vector<bf16> hidden_;
};

// All groups of a step, with or without adapters.
class LoraGroups {
  public:
    void plan(const ServeStep& step) {
        layers_ = static_cast<int>(step.pools[0].layers);
        has_adapters_ = step.num_segments > 0;
        for (int i = 0; i < kGroups; i++)
            groups_[i].plan(step.pools[i], step.modules, step.segments, static_cast<int>(step.num_segments),
                            step.weights);
    }

    // Reduces all groups but kQkv to the wanted tokens of each run.
    void keep_wanted(const ServeStep& step) {
        if (!has_adapters_) return;
        const ServeRun *run = step.runs, *end = step.runs + step.num_runs;
        int64_t before = 0;  // wanted tokens of the runs before `run`
        // Returns the new index of the first wanted token from `token` on. Calls are in ascending order.
        auto place = [&](int64_t token) {
            for (; run < end && run->stop <= token; run++) before += run->num_wanted;
            return run == end ? before : before + std::max<int64_t>(0, token - (run->stop - run->num_wanted));
        };
        wanted_.assign(step.segments, step.segments + step.num_segments);
        for (LoraSegment& segment : wanted_) {
            segment.start = place(segment.start);
            segment.stop = place(segment.stop);
        }
        for (int i = kQkv + 1; i < kGroups; i++)
            groups_[i].plan(step.pools[i], step.modules, wanted_.data(), static_cast<int>(wanted_.size()),
                            step.weights);
    }
    LoraGroup& operator[](int group) { return groups_[group]; }

    // Adds to `prefetch` what item `index` of `count` items of a group's product reads of B, and its share of the A
    // that the next group's product reads first.
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
