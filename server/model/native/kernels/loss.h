// Cross-entropy under softmax(hidden headᵀ) and its gradient, in one pass over the head that never stores all logits.
// If the head is trained too, the logits of kLossRows rows are stored for its gradient.
//
// The softmax is computed like an attention's, with the head's rows as keys and values (Milakov & Gimelshein 2018,
// arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135): each row has its greatest logit so far, and its sums are scaled
// when a greater one is found. The target's share is left out of the sums and added exactly. The vocabulary is divided
// into parts whose sums are added in order, so that no result depends on the number of threads.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "panels.h"
#include "team.h"

constexpr int kLossRows = 256;  // rows per pass over the head
constexpr int kLossParts = 16;  // parts of the vocabulary
constexpr int kLossTiles = 8;   // tiles of the vocabulary whose logits are computed together

class Loss {
  public:
    Loss(Team* team, const bf16* head, int64_t vocab, int64_t hidden)
        : team_(team), head_(head), vocab_(vocab), hidden_(hidden), scratch_(team->size()) {}

    // Returns the summed cross-entropy of `targets` (rows) under softmax(hidden headᵀ), for hidden (rows, hidden).
    // d_hidden = factor · its gradient; d_head (vocab, hidden) += factor · the head's gradient, unless d_head is null.
    double run(const bf16* hidden, const int64_t* targets, int64_t rows, double factor, bf16* d_hidden, float* d_head) {
        double sum = 0;
        for (int64_t start = 0; start < rows; start += kLossRows) {
            const int count = static_cast<int>(std::min<int64_t>(kLossRows, rows - start));
            const bf16* x = hidden + start * hidden_;
            const int64_t* x_targets = targets + start;
            float* kept = d_head != nullptr ? room(kept_, count * vocab_) : nullptr;
            losses_.resize(count);
            divisors_.resize(count);
            each_row<true>(x, x_targets, count, kept, [&](int row, const Softmax& softmax, const float* mixed) {
                losses_[row] = softmax.loss;
                divisors_[row] = static_cast<float>(softmax.log_divisor);
                hidden_gradient(softmax, mixed, count, x_targets[row], factor, d_hidden + (start + row) * hidden_);
            });
            sum = std::accumulate(losses_.begin(), losses_.end(), sum);
            if (d_head != nullptr) add_head_gradient(x, x_targets, count, kept, factor, d_head);
        }
        return sum;
    }

    // Computes each row's cross-entropy, with the bits that `run` adds up, and the likeliest token, the first of
    // equals.
    void measure(const bf16* hidden, const int64_t* targets, int64_t rows, double* losses, int64_t* likeliest) {
        for (int64_t start = 0; start < rows; start += kLossRows)
            each_row<false>(hidden + start * hidden_, targets + start,
                            static_cast<int>(std::min<int64_t>(kLossRows, rows - start)), nullptr,
                            [&](int row, const Softmax& softmax, const float*) {
                                losses[start + row] = softmax.loss;
                                likeliest[start + row] = softmax.likeliest;
                            });
    }

  private:
    // A row's sum over a part of the vocabulary.
    struct PartSum {
        float greatest;     // the part's greatest logit, the target's included
        int64_t likeliest;  // the token that has it
        double sum;         // Σ e^(logit - greatest) without the target
    };
    // A row's softmax, combined from its parts.
    struct Softmax {
        double loss;
        double sum, others;        // Σ e^(logit - greatest) over all tokens, and without the target
        double log_divisor;        // ln Σ e^logit
        float scales[kLossParts];  // e^(a part's greatest logit - the row's)
        int64_t likeliest;
    };
    struct alignas(64) LossScratch {  // one thread's
        Panel panel;
        Aligned<float> logits;
        Aligned<bf16> weights, transposed;
        WideRows wide_hidden, wide_weights;
    };
    static constexpr int kDepth = kLossTiles * kTile;

    // Calls item(row, its softmax, its first part in mixed_) for each of at most kLossRows rows; `kept` as in `mix`.
    template <bool has_gradient, class Item>
    void each_row(const bf16* hidden, const int64_t* targets, int rows, float* kept, Item item) {
        if (has_gradient) mixed_.resize(kLossParts * rows * hidden_);
        part_sums_.resize(kLossParts * rows);
        target_logit_.resize(rows);
        team_->run([&] {
            team_->each(kLossParts, [&](int part) { mix<has_gradient>(hidden, targets, rows, part, kept); });
            team_->each(
                rows, [&](int row) { item(row, combine(row, rows), has_gradient ? &mixed_[row * hidden_] : nullptr); });
        });
    }

    int64_t first_tile(int part) const { return vocab_ / kTile * part / kLossParts; }

    // Computes a part's PartSums and, if there is a gradient, mixed (rows, hidden) = Σ e^(logit - greatest) · head over
    // the part's tokens without the targets. Unless `kept` is null, it gets the logits: those of each kLossTiles tiles
    // as (rows, their tokens), one after the other.
    template <bool has_gradient>
    void mix(const bf16* hidden, const int64_t* targets, int rows, int part, float* kept) {
        const int64_t tiles = vocab_ / kTile, end = first_tile(part + 1);
        float* mixed = has_gradient ? &mixed_[static_cast<int64_t>(part) * rows * hidden_] : nullptr;
        PartSum* part_sums = &part_sums_[static_cast<int64_t>(part) * rows];
        if (has_gradient) std::fill_n(mixed, rows * hidden_, 0.0f);
        std::fill_n(part_sums, rows, PartSum{-std::numeric_limits<float>::infinity(), 0, 0});
        LossScratch& scratch = scratch_[Team::number()];
        float* logits = kept == nullptr ? room(scratch.logits, rows * kDepth) : nullptr;
        bf16* weights = has_gradient ? room(scratch.weights, rows * kDepth) : nullptr;
        uint32_t* panel = room(scratch.panel, std::max<int64_t>(hidden_, kDepth) / 2 * kTile);
        scratch.wide_hidden.begin(tiles / kLossParts);
        const Rows x = scratch.wide_hidden.rows(hidden, hidden_, 0, rows);
        for (int64_t first = first_tile(part); first < end; first += kLossTiles) {
            const int count = static_cast<int>(std::min<int64_t>(kLossTiles, end - first)), width = count * kTile;
            const bf16* head = head_ + first * kTile * hidden_;
            if (kept != nullptr) logits = kept + first * kTile * rows;
            multiply_tiles(x, rows, first, count, panel, logits);
            for (int row = 0; row < rows; row++)
                weigh<has_gradient>(logits + row * width, width, first * kTile, targets[row], part_sums[row],
                                    target_logit_[row], has_gradient ? mixed + row * hidden_ : nullptr,
                                    has_gradient ? weights + row * kDepth : nullptr);
            if (!has_gradient) continue;
            scratch.wide_weights.begin(hidden_ / kTile);
            const Rows weight_rows = scratch.wide_weights.rows(weights, kDepth, 0, rows);
            for (int64_t column = 0; column < hidden_; column += kTile) {
                pack_columns(head + column, hidden_, width, panel);
                multiply<true>(weight_rows, rows, reinterpret_cast<const bf16*>(panel), width / 2, mixed + column,
                               hidden_);
            }
        }
    }

    // logits (rows, 32 · count) for `count` tiles of the vocabulary.
    void multiply_tiles(const Rows& hidden, int rows, int64_t first, int count, uint32_t* panel, float* logits) const {
        for (int tile = 0; tile < count; tile++) {
            pack_rows(head_ + (first + tile) * kTile * hidden_, hidden_, kTile, static_cast<int>(hidden_), panel);
            multiply_and_prefetch(hidden, rows, panel, static_cast<int>(hidden_) / 2, logits + tile * kTile,
                                  count * kTile, head_ + (first + tile + 1) * kTile * hidden_, kTile,
                                  static_cast<int>(hidden_));
        }
    }

    // weights (width) = e^(logit - greatest) for the tokens from `first` on, 0 for the target; adds them to `part`. If
    // a logit is greater than all before, `part` and `mixed` are scaled first.
    template <bool has_gradient>
    void weigh(const float* logits, int width, int64_t first, int64_t target, PartSum& part, float& target_logit,
               float* mixed, bf16* weights) const {
        target -= first;
        F32x16 maxima = load(logits);
        for (int i = 16; i < width; i += 16) maxima = max(maxima, load(logits + i));
        const float greatest = reduce_max(maxima);
        if (greatest > part.greatest) {
            const double scale = std::exp(static_cast<double>(part.greatest) - greatest);
            const F32x16 scales = broadcast(static_cast<float>(scale));
            for (int64_t i = 0; has_gradient && i < hidden_; i += 16) store(mixed + i, load(mixed + i) * scales);
            part = {greatest, first + (std::find(logits, logits + width, greatest) - logits), part.sum * scale};
        }
        if (target >= 0 && target < width) target_logit = logits[target];
        const F32x16 shift = broadcast(part.greatest);
        F64x8 sum{};
        for (int i = 0; i < width; i += 16) {
            const int64_t lane = target - i;
            const auto others = static_cast<Mask16>(lane >= 0 && lane < 16 ? ~(1 << lane) : 0xffff);
            const F32x16 p = choose(others, exp16(load(logits + i) - shift), F32x16{});
            sum = sum + (widen_low(p) + widen_high(p));
            if (has_gradient) store_bf16(weights + i, p);
        }
        part.sum += reduce_add(sum);
    }

    Softmax combine(int row, int rows) const {
        float greatest = -std::numeric_limits<float>::infinity();
        Softmax softmax{};
        for (int i = 0; i < kLossParts; i++) {
            const PartSum& part = part_sums_[i * rows + row];
            if (part.greatest > greatest) {
                greatest = part.greatest;
                softmax.likeliest = part.likeliest;
            }
        }
        for (int i = 0; i < kLossParts; i++) {
            const PartSum& part = part_sums_[i * rows + row];
            const double scale = std::exp(static_cast<double>(part.greatest) - greatest);
            softmax.others += part.sum * scale;
            softmax.scales[i] = static_cast<float>(scale);
        }
        softmax.sum = softmax.others + std::exp(static_cast<double>(target_logit_[row]) - greatest);
        softmax.log_divisor = std::log(softmax.sum) + greatest;
        softmax.loss = softmax.log_divisor - target_logit_[row];
        return softmax;
    }

    // d_hidden (hidden) = factor · Σ (softmax - one-hot) head, from the parts of `mixed`.
    void hidden_gradient(const Softmax& softmax, const float* mixed, int rows, int64_t target, double factor,
                         bf16* d_hidden) {
        const F32x16 scale = broadcast(static_cast<float>(factor / softmax.sum));
        const F32x16 others = broadcast(static_cast<float>(softmax.others));
        for (int64_t i = 0; i < hidden_; i += 16) {
            F32x16 d{};
            for (int part = 0; part < kLossParts; part++)
                d = fmadd(broadcast(softmax.scales[part]),
                          load(&mixed[static_cast<int64_t>(part) * rows * hidden_ + i]), d);
            d = fnmadd(others, load_bf16(head_ + target * hidden_ + i), d);
            store_bf16(d_hidden + i, d * scale);
        }
    }

    // d_head += factor · (softmax - one-hot)ᵀ hidden, from the logits that `mix` stored. Their softmax needs the
    // divisor, which is known only after all parts.
    void add_head_gradient(const bf16* hidden, const int64_t* targets, int rows, const float* kept, double factor,
                           float* d_head) {
        const int pairs = (rows + 1) / 2;
        const int max_tiles = static_cast<int>((vocab_ / kTile + kLossParts - 1) / kLossParts);
        const int pieces = (max_tiles + kLossTiles - 1) / kLossTiles;  // per part
        uint32_t* columns = room(columns_, pairs * hidden_);
        team_->run([&] {
            team_->each(static_cast<int>(hidden_ / kTile), [&](int tile) {
                pack_columns(hidden + tile * kTile, hidden_, rows,
                             columns + static_cast<int64_t>(tile) * pairs * kTile);
            });
            team_->each(kLossParts * pieces, [&](int item) {
                const int part = item / pieces;
                const int64_t first = first_tile(part) + static_cast<int64_t>(item % pieces) * kLossTiles;
                const int width = static_cast<int>(std::min<int64_t>(kLossTiles, first_tile(part + 1) - first)) * kTile;
                if (width <= 0) return;
                LossScratch& scratch = scratch_[Team::number()];
                const float* logits = kept + first * kTile * rows;
                bf16* d_logits = room(scratch.weights, rows * kDepth);
                bf16* d_logits_T = room(scratch.transposed, kDepth * kLossRows);
                for (int row = 0; row < rows; row++)
                    softmax_gradient(logits + row * width, width, divisors_[row], targets[row] - first * kTile, factor,
                                     d_logits + row * kDepth);
                transpose(d_logits, kDepth, rows, width, d_logits_T, kLossRows);
                scratch.wide_weights.begin(hidden_ / kTile);
                const Rows d_logits_rows = scratch.wide_weights.rows(d_logits_T, kLossRows, 0, width);
                for (int64_t column = 0; column < hidden_; column += kTile)
                    multiply<true>(d_logits_rows, width, reinterpret_cast<const bf16*>(columns + column * pairs), pairs,
                                   d_head + first * kTile * hidden_ + column, hidden_);
            });
        });
    }

    // d_logits (width) = factor · (softmax - one-hot). The target may be outside of [0, width).
    static void softmax_gradient(const float* logits, int width, float log_divisor, int64_t target, double factor,
                                 bf16* d_logits) {
        const F32x16 shift = broadcast(log_divisor), factors = broadcast(static_cast<float>(factor));
        for (int i = 0; i < width; i += 16) {
            const int64_t lane = target - i;
            const auto is_target = static_cast<Mask16>(lane >= 0 && lane < 16 ? 1 << lane : 0);
            F32x16 p = exp16(load(logits + i) - shift);
            p = choose(is_target, p - broadcast(1), p);
            store_bf16(d_logits + i, p * factors);
        }
    }

    Team* team_ = nullptr;
    const bf16* head_ = nullptr;  // (vocab, hidden)
    int64_t vocab_ = 0, hidden_ = 0;
    Aligned<float> mixed_;            // (parts, rows, hidden)
    std::vector<PartSum> part_sums_;  // (parts, rows)
    Aligned<float> target_logit_;
    std::vector<double> losses_;
    Aligned<float> divisors_;  // each row's ln Σ e^logit
    Aligned<float> kept_;      // logits, if the head is trained
    Panel columns_;            // packed hidden states
    std::vector<LossScratch> scratch_;
};
