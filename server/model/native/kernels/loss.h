// Cross-entropy under softmax(hidden headᵀ) and its gradient, without ever holding all logits.
//
// The vocabulary is cut into parts whose shares of the gradient are summed in order, so that no result depends on the
// number of threads.
#pragma once
#include <cmath>

#include "panels.h"
#include "team.h"

constexpr int kLossRows = 256;  // rows whose logits exist at one time
constexpr int kLossParts = 16;  // of the vocabulary, whose shares of the logits' gradient are summed in order
constexpr int kLossTiles = 16;  // of the vocabulary that are multiplied with the head at one time

class Loss {
  public:
    Loss(Team* team, const bf16* head, int64_t vocab, int64_t hidden)
        : team_(team), head_(head), vocab_(vocab), hidden_(hidden), scratch_(team->size()) {}

    // The summed cross-entropy of `targets` under softmax(hidden headᵀ), and `factor` times its gradient in hidden
    // (rows, hidden). No more than kLossRows rows have their logits at one time.
    double run(const bf16* hidden, const int64_t* targets, int64_t rows, double factor, bf16* d_hidden) {
        double sum = 0;
        for (int64_t start = 0; start < rows; start += kLossRows) {
            const int now = (int)std::min<int64_t>(kLossRows, rows - start);
            logits_.resize(now * vocab_), shares_.resize(kLossParts * now * hidden_);
            for (auto* of : {&tile_max_, &sums_}) of->resize(now * (vocab_ / kTile));
            logsumexp_.resize(now), lost_.resize(now);
            team_->run([&] {
                of_rows(hidden + start * hidden_, targets + start, now, (float)factor, d_hidden + start * hidden_);
            });
            for (float of : lost_) sum += of;
        }
        return sum;
    }

  private:
    // The logits lie tile by tile of the vocabulary, (tiles, rows, 32), so that what an item writes lies together.
    void of_rows(const bf16* hidden, const int64_t* targets, int rows, float factor, bf16* d_hidden) {
        const int tiles = (int)(vocab_ / kTile);
        team_->each(tiles, [&](int tile) {
            uint32_t* panel = room(scratch_[Team::number()].panel, hidden_ / 2 * kTile);
            pack_rows(head_ + tile * kTile * hidden_, hidden_, kTile, (int)hidden_, panel);
            float* of = &logits_[(int64_t)tile * rows * kTile];
            multiply(hidden, hidden_, rows, panel, (int)hidden_ / 2, of, kTile);
            for (int row = 0; row < rows; row++, of += kTile) {
                __m512 a = _mm512_loadu_ps(of), b = _mm512_loadu_ps(of + 16);
                const float most = _mm512_reduce_max_ps(_mm512_max_ps(a, b));
                const __m512 shift = _mm512_set1_ps(most);
                const __m512 sum = _mm512_add_ps(exp16(_mm512_sub_ps(a, shift)), exp16(_mm512_sub_ps(b, shift)));
                tile_max_[row * tiles + tile] = most, sums_[row * tiles + tile] = _mm512_reduce_add_ps(sum);
            }
        });
        team_->each(rows, [&](int row) {
            const float *most = &tile_max_[row * tiles], *sums = &sums_[row * tiles];
            const float top = *std::max_element(most, most + tiles);
            double sum = 0;
            for (int tile = 0; tile < tiles; tile++) sum += sums[tile] * std::exp(most[tile] - top);
            logsumexp_[row] = top + (float)std::log(sum);
            const int64_t target = targets[row];
            lost_[row] = logsumexp_[row] - logits_[(target / kTile * rows + row) * kTile + target % kTile];
        });
        team_->each(kLossParts, [&](int part) {
            const int end = (int)((int64_t)tiles * (part + 1) / kLossParts);
            float* share = &shares_[(int64_t)part * rows * hidden_];
            std::fill_n(share, rows * hidden_, 0.0f);
            for (int tile = (int)((int64_t)tiles * part / kLossParts); tile < end; tile += kLossTiles)
                add_share(targets, rows, factor, tile, std::min(kLossTiles, end - tile), share);
        });
        team_->each(rows, [&](int row) {
            for (int64_t i = row * hidden_; i < (row + 1) * hidden_; i += 16) {
                __m512 sum = _mm512_loadu_ps(&shares_[i]);
                for (int64_t part = 1; part < kLossParts; part++)
                    sum = _mm512_add_ps(sum, _mm512_loadu_ps(&shares_[part * rows * hidden_ + i]));
                store_bf16(d_hidden + i, sum);
            }
        });
    }

    // share (rows, hidden) += factor · (softmax - one-hot) times head, for some tiles of the vocabulary.
    void add_share(const int64_t* targets, int rows, float factor, int first, int count, float* share) {
        constexpr int kDepth = kLossTiles * kTile;
        LossScratch& scratch = scratch_[Team::number()];
        bf16* d_logits = room(scratch.d_logits, rows * kDepth);
        uint32_t* panel = room(scratch.panel, kDepth / 2 * kTile);
        for (int tile = 0; tile < count; tile++)
            for (int row = 0; row < rows; row++) {
                const float* of = &logits_[((int64_t)(first + tile) * rows + row) * kTile];
                for (int i = 0; i < kTile; i += 16) {
                    __m512 p = exp16(_mm512_sub_ps(_mm512_loadu_ps(of + i), _mm512_set1_ps(logsumexp_[row])));
                    const int64_t place = targets[row] - (first + tile) * kTile - i;
                    const auto one = (__mmask16)(place >= 0 && place < 16 ? 1 << place : 0);
                    p = _mm512_mask_sub_ps(p, one, p, _mm512_set1_ps(1.0f));
                    store_bf16(&d_logits[row * kDepth + tile * kTile + i], _mm512_mul_ps(p, _mm512_set1_ps(factor)));
                }
            }
        for (int64_t column = 0; column < hidden_; column += kTile) {
            pack_columns(head_ + first * kTile * hidden_ + column, hidden_, count * kTile, panel);
            multiply<true>(d_logits, kDepth, rows, panel, count * kTile / 2, share + column, hidden_);
        }
    }

    struct alignas(64) LossScratch {  // of one thread
        Panel panel;
        std::vector<bf16> d_logits;
    };
    Team* team_ = nullptr;
    const bf16* head_ = nullptr;  // (vocab, hidden)
    int64_t vocab_ = 0, hidden_ = 0;
    std::vector<float> logits_;  // (tiles, rows, 32)
    std::vector<float> tile_max_,
        sums_;  // (rows, tiles): of each tile, the greatest logit and the sum of e^(logit - it)
    std::vector<float> logsumexp_, lost_;  // of each row: the logarithm of the softmax's divisor, and the loss
    std::vector<float> shares_;            // (parts, rows, hidden): of the gradient
    std::vector<LossScratch> scratch_;
};
