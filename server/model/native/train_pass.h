// What the two passes over a training batch share: the base as it lies, the buffers of a batch, and how its rows are
// dealt out to threads.
#pragma once

#include "kernels/layers.h"
#include "kernels/phases.h"
#include "kernels/products.h"
#include "kernels/team.h"
#include "kernels/training_attention.h"
#include "seam/checks.h"

namespace {

constexpr int kRows = 64;  // at most so many rows are one item of work, where rows are computed one by one

struct TrainLayer {
    const bf16 *input_norm, *qkv, *o, *post_norm, *gate_up, *down;
    bool uses_rotary;
};

struct Saved {                             // of one layer, from the forward pass for the backward pass
    Aligned<float> in, middle;             // the residual stream before attention, and before the feed-forward
    Aligned<float> in_rms, middle_rms;     // of each of their rows 1 / the root mean square
    Aligned<bf16> qkv, attn_out, gate_up;  // queries and keys are rotated
    Aligned<bf16> hidden[kGroups];         // x Aᵀ
};

struct alignas(64) TrainScratch {  // of one thread
    ProductScratch product;
    TextScratch text;
    Aligned<float> y, dq;
};

class TrainPass {
  protected:
    TrainPass(const BaseSizes& sizes, const BaseTensor* tensors, const float* rotary, const uint8_t* uses_rotary)
        : s_(sizes),
          rotary_(rotary),
          team_((int)sizes.threads),
          layers_(sizes.layers),
          saved_(sizes.layers),
          scratch_(sizes.threads) {
        embed_ = tensors++->values;
        for (int64_t i = 0; i < s_.layers; i++) {
            TrainLayer& layer = layers_[i];
            layer.uses_rotary = uses_rotary[i];
            for (auto* to : {&layer.input_norm, &layer.qkv, &layer.o, &layer.post_norm, &layer.gate_up, &layer.down})
                *to = tensors++->values;
        }
        final_norm_ = tensors++->values;
        lm_head_ = tensors++->values;
        q_ = s_.heads * s_.head_dim, kv_ = s_.kv_heads * s_.head_dim, wide_ = q_ + 2 * kv_;
    }

    // Everything that the phases share, sized for this batch.
    void prepare(const TrainBatch& batch) {
        tokens_ = (int)batch.num_tokens, keeps_ = batch.has_backward != 0;
        const int64_t t = tokens_;
        for (int64_t i = 0; i < s_.layers; i++) {
            Saved& saved = this->saved(i);
            room(saved.in, t * s_.hidden), room(saved.middle, t * s_.hidden);
            room(saved.in_rms, t), room(saved.middle_rms, t);
            room(saved.qkv, t * wide_), room(saved.attn_out, t * q_), room(saved.gate_up, t * 2 * s_.intermediate);
            for (int group = 0; group < kGroups; group++)
                room(saved.hidden[group], t * batch.lora[i * kGroups + group].rows);
        }
        room(last_, t * s_.hidden), room(last_rms_, t), room(x_, t * s_.hidden), room(active_, t * s_.intermediate);
        room(lora_input_, t * std::max({s_.hidden, s_.intermediate, q_}));
        if (keeps_) prepare_backward(batch);
        positions_.resize(t);
        for (int64_t text = 0; text < batch.num_texts; text++)
            for (int64_t i = batch.starts[text]; i < batch.starts[text + 1]; i++)
                positions_[i] = (int)(i - batch.starts[text]);
        product_chunks_ = std::max((tokens_ + kProductRows - 1) / kProductRows,
                                   std::min((int)s_.threads / 4, (tokens_ + kRows - 1) / kRows));
        row_chunks_ = (tokens_ + kRows - 1) / kRows;
        row_chunks_ = (row_chunks_ + (int)s_.threads - 1) / (int)s_.threads * (int)s_.threads;
    }
    void prepare_backward(const TrainBatch& batch) {
        const int64_t t = tokens_;
        int64_t most = 0;
        for (int64_t i = 0; i < s_.layers * kGroups; i++) most = std::max(most, batch.lora[i].rows);
        across_ = (tokens_ + 31) / 32 * 32;
        for (auto* turned : {&lora_hidden_T_, &d_lora_hidden_T_}) room(*turned, most * across_);
        for (auto* d : {&d_residual_, &dx_}) room(*d, t * s_.hidden);
        if (batch.d_weights != nullptr) room(dy_T_, std::max({wide_, s_.hidden, 2 * s_.intermediate}) * across_);
        for (auto* d : {&dk_, &dv_}) room(*d, t * q_);
        room(d_lora_hidden_, most * t), room(dy_, t * s_.hidden), room(d_attn_out_, t * q_);
        room(d_qkv_, t * wide_), room(d_gate_up_, t * 2 * s_.intermediate);
    }

    // Of a layer; where no backward pass may follow all share one.
    Saved& saved(int64_t layer) { return saved_[keeps_ ? layer : 0]; }

    // item(first row, rows) over the batch, beginning with even rows.
    template <class Item>
    void each_rows(Item item) {
        const int rows = ((tokens_ + row_chunks_ - 1) / row_chunks_ + 1) / 2 * 2;
        team_.each((tokens_ + rows - 1) / rows, [&](int i) { item(i * rows, std::min(rows, tokens_ - i * rows)); });
    }

    // item(column item, first row, rows) over the batch.
    template <class Item>
    void each_product(int columns, Item item) {
        scratch().product.wide.begin(columns / s_.threads);
        team_.each(columns * product_chunks_, [&](int i) { product_item(i, item); });
    }
    template <class Item>
    void product_item(int i, Item& item) {
        const int rows = (tokens_ + product_chunks_ - 1) / product_chunks_, start = i % product_chunks_ * rows;
        if (start < tokens_) item(i / product_chunks_, start, std::min(rows, tokens_ - start));
    }

    TrainScratch& scratch() { return scratch_[Team::number()]; }

    Text view(const Saved& saved, const TrainBatch& batch, int64_t text, int head) const {
        const int64_t start = batch.starts[text];
        const bf16* row = &saved.qkv[start * wide_];
        const int64_t kv_head = head / (s_.heads / s_.kv_heads);
        return {row + head * s_.head_dim,
                row + q_ + kv_head * s_.head_dim,
                row + q_ + kv_ + kv_head * s_.head_dim,
                (size_t)wide_,
                (int)(batch.starts[text + 1] - start),
                (int)s_.head_dim};
    }

    // y = rows of x, divided by their root mean square and times `weight`; 1 / those are kept in inverse_rms.
    void norm(const float* x, const bf16* weight, int start, int rows, bf16* y, float* inverse_rms) const {
        for (int row = start; row < start + rows; row++)
            inverse_rms[row] = rms_norm(x + row * s_.hidden, weight, s_.hidden, s_.eps, y + row * s_.hidden);
    }

    void turn(float* values, int token, bool back) const {
        rotate(values, rotary_, s_.max_positions, s_.head_dim, positions_[token], back);
    }

    // What A is multiplied with: x (tokens, in), or with dropout a copy in lora_input_ of which features are dropped.
    const bf16* met(const TrainGroup& lora, const TrainBatch& batch, const bf16* x, int64_t in, int start, int rows) {
        if (lora.kept == nullptr) return x;
        keep(lora.kept, batch.factor, x, in, start, rows, lora_input_.data());
        return lora_input_.data();
    }

    const BaseSizes s_;
    int64_t q_, kv_, wide_;  // features of queries, of keys, and of queries, keys and values
    const float* rotary_;    // (2, max_positions, head_dim), as `rotary_table` makes it
    Team team_;
    PhaseClock<TrainPhase, kTrainPhases> clock_;
    std::vector<TrainLayer> layers_;
    const bf16 *embed_, *final_norm_, *lm_head_;

    int tokens_ = 0, product_chunks_ = 0, row_chunks_ = 0, across_ = 0;  // across: tokens, in thirty-twos
    bool keeps_ = true;                                                  // what the backward pass reads
    std::vector<Saved> saved_;
    Aligned<float> last_, last_rms_;  // the residual stream after the last layer, and its rows' as in `Saved`
    Aligned<float> d_residual_, dx_;  // the gradients of the residual stream, and of what a norm gave
    Aligned<bf16> x_, active_;        // the newest outputs of a norm and of the activation
    Aligned<bf16> lora_input_;        // the same after dropout, where there is any: what A is multiplied with
    Aligned<bf16> dy_, d_attn_out_, d_qkv_, d_gate_up_;
    Aligned<float> dk_, dv_;  // (heads, tokens, dim): of each query head
    // Of the newest group: dy Bᵀ (tokens, rows of A), and both x Aᵀ and dy Bᵀ as (rows of A, tokens).
    Aligned<bf16> d_lora_hidden_, lora_hidden_T_, d_lora_hidden_T_;
    Aligned<bf16> dy_T_;  // where the base is trained: the newest gradient of a product's outputs as (out, tokens)
    std::vector<int> positions_;
    std::vector<TrainScratch> scratch_;
    TrainBatch batch_{};
    bool has_passed_ = false;  // whether `batch_` went forward and not yet backward
};

}  // namespace
