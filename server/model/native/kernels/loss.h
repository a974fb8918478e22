// Cross-entropy under softmax(hidden headᵀ) and its gradient in one pass over the head, without ever holding all
// logits. Where the head is trained as well, those of kLossRows rows are kept for its gradient.
//
// The softmax is an attention's, with the head's rows for keys and values (Milakov & Gimelshein 2018, arXiv:1805.02867;
// Dao et al. 2022, arXiv:2205.14135): of each row the greatest logit so far is kept, and the sums beside it are scaled
// when a greater one comes. The target's share is left out of the sums and added exactly. The vocabulary is cut into
// parts whose sums are added in order, so that no result depends on the number of threads.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "panels.h"
#include "team.h"

constexpr int kLossRows = 256;  // rows that meet the head at one time
constexpr int kLossParts = 16;  // of the vocabulary, whose sums are added in order
constexpr int kLossTiles = 8;   // of the vocabulary that are multiplied with the head at one time

class Loss {
  public:
    Loss(Team* team, const bf16* head, int64_t vocab, int64_t hidden)
        : team_(team), head_(head), vocab_(vocab), hidden_(hidden), scratch_(team->size()) {}

    // The summed cross-entropy of `targets` under softmax(hidden headᵀ), and `factor` times its gradient in hidden
    // (rows, hidden). The same of the head's is added to d_head (vocab, hidden), unless that is null.
    double run(const bf16* hidden, const int64_t* targets, int64_t rows, double factor, bf16* d_hidden, float* d_head) {
        double sum = 0;
        for (int64_t start = 0; start < rows; start += kLossRows) {
            const int now = (int)std::min<int64_t>(kLossRows, rows - start);
            const bf16* x = hidden + start * hidden_;
            const int64_t* of = targets + start;
            float* kept = d_head != nullptr ? room(kept_, now * vocab_) : nullptr;
            losses_.resize(now), divisors_.resize(now);
            each_row<true>(x, of, now, kept, [&](int row, const Softmax& softmax, const float* mixed) {
                losses_[row] = softmax.loss, divisors_[row] = (float)softmax.divisor;
                unmix(softmax, mixed, now, of[row], factor, d_hidden + (start + row) * hidden_);
            });
            sum = std::accumulate(losses_.begin(), losses_.end(), sum);
            if (d_head != nullptr) add_head_gradient(x, of, now, kept, factor, d_head);
        }
        return sum;
    }

    // Each row's cross-entropy, the very numbers that `run` adds up, and the likeliest token, the first of equal ones.
    void measure(const bf16* hidden, const int64_t* targets, int64_t rows, double* losses, int64_t* likeliest) {
        for (int64_t start = 0; start < rows; start += kLossRows)
            each_row<false>(hidden + start * hidden_, targets + start, (int)std::min<int64_t>(kLossRows, rows - start),
                            nullptr, [&](int row, const Softmax& softmax, const float*) {
                                losses[start + row] = softmax.loss, likeliest[start + row] = softmax.likeliest;
                            });
    }

  private:
    // Of the other tokens than the target in a part of the vocabulary: sums of e^(logit - greatest).
    struct Others {
        float greatest;     // logit, the target's included
        int64_t likeliest;  // whose it is
        double sum;
    };
    // Of a row, from what its parts found.
    struct Softmax {
        double loss, sum, others;  // sum: of e^(logit - greatest) over all tokens, others: but for the target
        double divisor;            // the logarithm of the softmax's
        float by[kLossParts];      // what a part's sums are multiplied by
        int64_t likeliest;
    };
    struct alignas(64) LossScratch {  // of one thread
        Panel panel;
        Aligned<float> logits;
        Aligned<bf16> weights, turned;
        WideRows wide_hidden, wide_weights;
    };
    static constexpr int kDepth = kLossTiles * kTile;

    // item(row, what its softmax is, its place in `mixed`) for each of at most kLossRows rows; `kept` as in `mix`.
    template <bool has_gradient, class Item>
    void each_row(const bf16* hidden, const int64_t* targets, int rows, float* kept, Item item) {
        if (has_gradient) mixed_.resize(kLossParts * rows * hidden_);
        others_.resize(kLossParts * rows), target_logit_.resize(rows);
        team_->run([&] {
            team_->each(kLossParts, [&](int part) { mix<has_gradient>(hidden, targets, rows, part, kept); });
            team_->each(
                rows, [&](int row) { item(row, combine(row, rows), has_gradient ? &mixed_[row * hidden_] : nullptr); });
        });
    }

    int64_t first_tile(int part) const { return vocab_ / kTile * part / kLossParts; }

    // mixed (rows, hidden) = Σ e^(logit - greatest) · head over a part's tokens, but for the targets, where there is to
    // be a gradient. Logits are left in `kept`, unless that is null: those of the tiles that are multiplied at one time
    // as (rows, their tokens), one after the other.
    template <bool has_gradient>
    void mix(const bf16* hidden, const int64_t* targets, int rows, int part, float* kept) {
        const int64_t tiles = vocab_ / kTile, end = first_tile(part + 1);
        float* mixed = has_gradient ? &mixed_[(int64_t)part * rows * hidden_] : nullptr;
        Others* others = &others_[(int64_t)part * rows];
        if (has_gradient) std::fill_n(mixed, rows * hidden_, 0.0f);
        std::fill_n(others, rows, Others{-std::numeric_limits<float>::infinity(), 0, 0});
        LossScratch& scratch = scratch_[Team::number()];
        float* logits = kept == nullptr ? room(scratch.logits, rows * kDepth) : nullptr;
        bf16* weights = has_gradient ? room(scratch.weights, rows * kDepth) : nullptr;
        uint32_t* panel = room(scratch.panel, std::max<int64_t>(hidden_, kDepth) / 2 * kTile);
        scratch.wide_hidden.begin(tiles / kLossParts);
        const Rows x = scratch.wide_hidden.rows(hidden, hidden_, 0, rows);
        for (int64_t first = first_tile(part); first < end; first += kLossTiles) {
            const int count = (int)std::min<int64_t>(kLossTiles, end - first), width = count * kTile;
            const bf16* head = head_ + first * kTile * hidden_;
            if (kept != nullptr) logits = kept + first * kTile * rows;
            multiply_tiles(x, rows, first, count, panel, logits);
            for (int row = 0; row < rows; row++)
                weigh<has_gradient>(logits + row * width, width, first * kTile, targets[row], others[row],
                                    target_logit_[row], has_gradient ? mixed + row * hidden_ : nullptr,
                                    has_gradient ? weights + row * kDepth : nullptr);
            if (!has_gradient) continue;
            scratch.wide_weights.begin(hidden_ / kTile);
            const Rows by = scratch.wide_weights.rows(weights, kDepth, 0, rows);
            for (int64_t column = 0; column < hidden_; column += kTile) {
                pack_columns(head + column, hidden_, width, panel);
                multiply<true>(by, rows, (const bf16*)panel, width / 2, mixed + column, hidden_);
            }
        }
    }

    // logits (rows, 32 · count) of `count` tiles of the vocabulary.
    void multiply_tiles(const Rows& hidden, int rows, int64_t first, int count, uint32_t* panel, float* logits) const {
        for (int tile = 0; tile < count; tile++) {
            pack_rows(head_ + (first + tile) * kTile * hidden_, hidden_, kTile, (int)hidden_, panel);
            multiply_and_prefetch(hidden, rows, panel, (int)hidden_ / 2, logits + tile * kTile, count * kTile,
                                  head_ + (first + tile + 1) * kTile * hidden_, kTile, (int)hidden_);
        }
    }

    // weights (width) = e^(logit - greatest) of the tokens from `first` on, 0 for the target.
    template <bool has_gradient>
    void weigh(const float* logits, int width, int64_t first, int64_t target, Others& others, float& target_logit,
               float* mixed, bf16* weights) const {
        target -= first;
        F32x16 top = load(logits);
        for (int i = 16; i < width; i += 16) top = max(top, load(logits + i));
        const float most = reduce_max(top);
        if (most > others.greatest) {
            const double by = std::exp((double)others.greatest - most);
            const F32x16 scale = broadcast((float)by);
            for (int64_t i = 0; has_gradient && i < hidden_; i += 16) store(mixed + i, load(mixed + i) * scale);
            others = {most, first + (std::find(logits, logits + width, most) - logits), others.sum * by};
        }
        if (target >= 0 && target < width) target_logit = logits[target];
        const F32x16 shift = broadcast(others.greatest);
        F64x8 sum{};
        for (int i = 0; i < width; i += 16) {
            const int64_t place = target - i;
            const auto but = static_cast<Mask16>(place >= 0 && place < 16 ? ~(1 << place) : 0xffff);
            const F32x16 p = choose(but, exp16(load(logits + i) - shift), F32x16{});
            sum = sum + (widen_low(p) + widen_high(p));
            if (has_gradient) store_bf16(weights + i, p);
        }
        others.sum += reduce_add(sum);
    }

    Softmax combine(int row, int rows) const {
        float greatest = -std::numeric_limits<float>::infinity();
        Softmax found{};
        for (int part = 0; part < kLossParts; part++) {
            const Others& of = others_[part * rows + row];
            if (of.greatest > greatest) greatest = of.greatest, found.likeliest = of.likeliest;
        }
        for (int part = 0; part < kLossParts; part++) {
            const Others& of = others_[part * rows + row];
            const double scale = std::exp((double)of.greatest - greatest);
            found.others += of.sum * scale, found.by[part] = (float)scale;
        }
        found.sum = found.others + std::exp((double)target_logit_[row] - greatest);
        found.divisor = std::log(found.sum) + greatest;
        found.loss = found.divisor - target_logit_[row];
        return found;
    }

    // d_hidden (hidden) = factor · Σ (softmax - one-hot) head, from what the parts have in `mixed`.
    void unmix(const Softmax& softmax, const float* mixed, int rows, int64_t target, double factor, bf16* d_hidden) {
        const F32x16 all = broadcast((float)(factor / softmax.sum)), but = broadcast((float)softmax.others);
        for (int64_t i = 0; i < hidden_; i += 16) {
            F32x16 d{};
            for (int part = 0; part < kLossParts; part++)
                d = fmadd(broadcast(softmax.by[part]), load(&mixed[(int64_t)part * rows * hidden_ + i]), d);
            d = fnmadd(but, load_bf16(head_ + target * hidden_ + i), d);
            store_bf16(d_hidden + i, d * all);
        }
    }

    // d_head += factor · (softmax - one-hot)ᵀ hidden, from the logits that `mix` kept: their softmax needs the divisor,
    // which is known once all of them were seen.
    void add_head_gradient(const bf16* hidden, const int64_t* targets, int rows, const float* kept, double factor,
                           float* d_head) {
        const int pairs = (rows + 1) / 2, most = (int)((vocab_ / kTile + kLossParts - 1) / kLossParts),
                  pieces = (most + kLossTiles - 1) / kLossTiles;  // of a part
        uint32_t* columns = room(columns_, pairs * hidden_);
        team_->run([&] {
            team_->each((int)(hidden_ / kTile), [&](int tile) {
                pack_columns(hidden + tile * kTile, hidden_, rows, columns + (int64_t)tile * pairs * kTile);
            });
            team_->each(kLossParts * pieces, [&](int item) {
                const int part = item / pieces;
                const int64_t first = first_tile(part) + (int64_t)(item % pieces) * kLossTiles;
                const int width = (int)std::min<int64_t>(kLossTiles, first_tile(part + 1) - first) * kTile;
                if (width <= 0) return;
                LossScratch& scratch = scratch_[Team::number()];
                const float* logits = kept + first * kTile * rows;
                bf16* d_logits = room(scratch.weights, rows * kDepth);
                bf16* turned = room(scratch.turned, kDepth * kLossRows);  // (tokens of the vocabulary, rows)
                for (int row = 0; row < rows; row++)
                    softmax_gradient(logits + row * width, width, divisors_[row], targets[row] - first * kTile, factor,
                                     d_logits + row * kDepth);
                transpose(d_logits, kDepth, rows, width, turned, kLossRows);
                scratch.wide_weights.begin(hidden_ / kTile);
                const Rows by = scratch.wide_weights.rows(turned, kLossRows, 0, width);
                for (int64_t column = 0; column < hidden_; column += kTile)
                    multiply<true>(by, width, (const bf16*)(columns + column * pairs), pairs,
                                   d_head + first * kTile * hidden_ + column, hidden_);
            });
        });
    }

    // d_logits (width) = factor · (softmax - one-hot); the target is one of them if it is in [0, width).
    static void softmax_gradient(const float* logits, int width, float divisor, int64_t target, double factor,
                                 bf16* d_logits) {
        const F32x16 shift = broadcast(divisor), by = broadcast((float)factor);
        for (int i = 0; i < width; i += 16) {
            const int64_t place = target - i;
            const auto is_target = static_cast<Mask16>(place >= 0 && place < 16 ? 1 << place : 0);
            F32x16 p = exp16(load(logits + i) - shift);
            p = choose(is_target, p - broadcast(1), p);
            store_bf16(d_logits + i, p * by);
        }
    }

    Team* team_ = nullptr;
    const bf16* head_ = nullptr;  // (vocab, hidden)
    int64_t vocab_ = 0, hidden_ = 0;
    Aligned<float> mixed_;        // (parts, rows, hidden)
    std::vector<Others> others_;  // (parts, rows)
    Aligned<float> target_logit_;
    std::vector<double> losses_;
    Aligned<float> divisors_;  // the logarithms of the softmaxes'
    Aligned<float> kept_;      // logits, where the head is trained
    Panel columns_;            // of hidden states
    std::vector<LossScratch> scratch_;
};
