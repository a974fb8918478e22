// Cross-entropy under softmax(hidden headᵀ) and its gradient in one pass over the head, without ever holding all
// logits.
//
// The softmax is an attention's, with the head's rows for keys and values (Milakov & Gimelshein 2018, arXiv:1805.02867;
// Dao et al. 2022, arXiv:2205.14135): of each row the greatest logit so far is kept, and the sums beside it are scaled
// when a greater one comes. The target's share is left out of the sums and added exactly. The vocabulary is cut into
// parts whose sums are added in order, so that no result depends on the number of threads.
#pragma once
#include <cmath>
#include <limits>

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
    // (rows, hidden).
    double run(const bf16* hidden, const int64_t* targets, int64_t rows, double factor, bf16* d_hidden) {
        double sum = 0;
        for (int64_t start = 0; start < rows; start += kLossRows) {
            const int now = (int)std::min<int64_t>(kLossRows, rows - start);
            mixed_.resize(kLossParts * now * hidden_), others_.resize(kLossParts * now), lost_.resize(now);
            target_logit_.resize(now);
            team_->run([&] {
                team_->each(kLossParts, [&](int part) { mix(hidden + start * hidden_, targets + start, now, part); });
                team_->each(now, [&](int row) {
                    combine(row, now, targets[start + row], factor, d_hidden + (start + row) * hidden_);
                });
            });
            for (double of : lost_) sum += of;
        }
        return sum;
    }

  private:
    // Of the other tokens than the target in a part of the vocabulary: sums of e^(logit - greatest).
    struct Others {
        float greatest;  // logit, the target's included
        double sum;
    };
    struct alignas(64) LossScratch {  // of one thread
        Panel panel;
        std::vector<float> logits;
        std::vector<bf16> weights;
    };
    static constexpr int kDepth = kLossTiles * kTile;

    // mixed (rows, hidden) = Σ e^(logit - greatest) · head over a part's tokens, but for the targets.
    void mix(const bf16* hidden, const int64_t* targets, int rows, int part) {
        const int64_t tiles = vocab_ / kTile, end = tiles * (part + 1) / kLossParts;
        float* mixed = &mixed_[(int64_t)part * rows * hidden_];
        Others* others = &others_[(int64_t)part * rows];
        std::fill_n(mixed, rows * hidden_, 0.0f);
        std::fill_n(others, rows, Others{-std::numeric_limits<float>::infinity(), 0});
        LossScratch& scratch = scratch_[Team::number()];
        float* logits = room(scratch.logits, rows * kDepth);
        bf16* weights = room(scratch.weights, rows * kDepth);
        uint32_t* panel = room(scratch.panel, std::max<int64_t>(hidden_, kDepth) / 2 * kTile);
        for (int64_t first = tiles * part / kLossParts; first < end; first += kLossTiles) {
            const int count = (int)std::min<int64_t>(kLossTiles, end - first), width = count * kTile;
            const bf16* head = head_ + first * kTile * hidden_;
            for (int tile = 0; tile < count; tile++) {
                pack_rows(head + tile * kTile * hidden_, hidden_, kTile, (int)hidden_, panel);
                multiply(hidden, hidden_, rows, panel, (int)hidden_ / 2, logits + tile * kTile, kDepth);
            }
            for (int row = 0; row < rows; row++)
                weigh(logits + row * kDepth, width, targets[row] - first * kTile, others[row], target_logit_[row],
                      mixed + row * hidden_, weights + row * kDepth);
            for (int64_t column = 0; column < hidden_; column += kTile) {
                pack_columns(head + column, hidden_, width, panel);
                multiply<true>(weights, kDepth, rows, panel, width / 2, mixed + column, hidden_);
            }
        }
    }

    // weights (width) = e^(logit - greatest), 0 for the target, which is one of them if `target` is in [0, width).
    void weigh(const float* logits, int width, int64_t target, Others& others, float& target_logit, float* mixed,
               bf16* weights) const {
        __m512 top = _mm512_loadu_ps(logits);
        for (int i = 16; i < width; i += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(logits + i));
        const float most = _mm512_reduce_max_ps(top);
        if (most > others.greatest) {
            const double by = std::exp((double)others.greatest - most);
            const __m512 scale = _mm512_set1_ps((float)by);
            for (int64_t i = 0; i < hidden_; i += 16)
                _mm512_storeu_ps(mixed + i, _mm512_mul_ps(_mm512_loadu_ps(mixed + i), scale));
            others = {most, others.sum * by};
        }
        if (target >= 0 && target < width) target_logit = logits[target];
        const __m512 shift = _mm512_set1_ps(others.greatest);
        __m512d sum = _mm512_setzero_pd();
        for (int i = 0; i < width; i += 16) {
            const int64_t place = target - i;
            const auto but = (__mmask16)(place >= 0 && place < 16 ? ~(1 << place) : 0xffff);
            const __m512 p = _mm512_maskz_mov_ps(but, exp16(_mm512_sub_ps(_mm512_loadu_ps(logits + i), shift)));
            sum = _mm512_add_pd(sum, _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(p)),
                                                   _mm512_cvtps_pd(_mm512_extractf32x8_ps(p, 1))));
            store_bf16(weights + i, p);
        }
        others.sum += _mm512_reduce_add_pd(sum);
    }

    // A row's loss, and d_hidden (hidden) = factor · Σ (softmax - one-hot) head, from what the parts found.
    void combine(int row, int rows, int64_t target, double factor, bf16* d_hidden) {
        float greatest = others_[row].greatest, by[kLossParts];
        for (int part = 1; part < kLossParts; part++)
            greatest = std::max(greatest, others_[part * rows + row].greatest);
        double others = 0;
        for (int part = 0; part < kLossParts; part++) {
            const Others& of = others_[part * rows + row];
            const double scale = std::exp((double)of.greatest - greatest);
            others += of.sum * scale, by[part] = (float)scale;
        }
        const double sum = others + std::exp((double)target_logit_[row] - greatest);
        lost_[row] = std::log(sum) + greatest - target_logit_[row];
        const __m512 all = _mm512_set1_ps((float)(factor / sum)), but = _mm512_set1_ps((float)others);
        for (int64_t i = 0; i < hidden_; i += 16) {
            __m512 d = _mm512_setzero_ps();
            for (int part = 0; part < kLossParts; part++)
                d = _mm512_fmadd_ps(_mm512_set1_ps(by[part]),
                                    _mm512_loadu_ps(&mixed_[((int64_t)part * rows + row) * hidden_ + i]), d);
            d = _mm512_fnmadd_ps(but, load_bf16(head_ + target * hidden_ + i), d);
            store_bf16(d_hidden + i, _mm512_mul_ps(d, all));
        }
    }

    Team* team_ = nullptr;
    const bf16* head_ = nullptr;  // (vocab, hidden)
    int64_t vocab_ = 0, hidden_ = 0;
    std::vector<float> mixed_;    // (parts, rows, hidden)
    std::vector<Others> others_;  // (parts, rows)
    std::vector<float> target_logit_;
    std::vector<double> lost_;
    std::vector<LossScratch> scratch_;
};
