// The backward pass of a training batch, over what its forward pass kept.
#pragma once

#include "train_forward.h"

namespace {

class TrainBackward : public TrainForward {
  public:
    using TrainForward::TrainForward;

    // From the gradient of the last `forward`'s answer to those of A and B, and of the base where that is trained;
    // once.
    void backward(const bf16* d_hidden) {
        if (!has_passed_) refuse("hidden states must be those of a forward pass that had no backward pass");
        const TrainBatch& batch = batch_;
        clock_.begin();
        team_.run([&] {
            float* const d_embed = gradient(0);  // read here, since nothing may follow a job's last phase
            each_rows([&](int start, int rows) {
                for (int64_t i = start * s_.hidden; i < (start + rows) * s_.hidden; i += 16) {
                    _mm512_storeu_ps(&dx_[i], load_bf16(d_hidden + i));
                    _mm512_storeu_ps(&d_residual_[i], _mm512_setzero_ps());
                }
            });
            norm_weight_backward(last_.data(), gradient(1 + s_.layers * kLayerTensors));
            each_rows([&](int start, int rows) { norm_backward(last_.data(), final_norm_, start, rows); });
            for (int i = (int)s_.layers - 1; i >= 0; i--) backward(i, batch);
            if (d_embed != nullptr)
                team_.each((int)(s_.hidden / kTile), [&](int tile) {
                    add_embedding_gradient(d_residual_.data(), batch.token_ids, tokens_, s_.hidden, tile * kTile,
                                           d_embed);
                });
        });
        clock_.end(kProductsBackwardPhase);
        has_passed_ = false;
    }

  private:
    void backward(int index, const TrainBatch& batch) {
        const TrainLayer& layer = layers_[index];
        const TrainGroup* lora = batch.lora + index * kGroups;
        const Saved& saved = this->saved(index);
        const int dim = (int)s_.head_dim;
        const int64_t hidden = s_.hidden, intermediate = s_.intermediate;
        const bool is_last = index == 0 && !trains_base();  // embeddings are frozen
        auto of = [&](LayerTensor tensor) { return gradient(1 + index * kLayerTensors + tensor); };
        auto lora_hidden = [&](Group group, const bf16* x, int64_t in, const bf16* dy, int64_t out, int start,
                               int rows) {
            met(lora[group], batch, x, in, start, rows);
            lora_hidden_backward(lora[group], dy, out, start, rows, saved.hidden[group].data());
            if (trains_base()) transpose(dy + start * out, out, rows, (int)out, &dy_T_[start], across_);
        };

        each_rows([&](int start, int rows) {
            activate(saved, 0, (int)intermediate, start, rows);
            round_to_bf16(&d_residual_[start * hidden], rows * hidden, &dy_[start * hidden]);
            lora_hidden(kDown, active_.data(), intermediate, dy_.data(), hidden, start, rows);
        });
        clock_.end(kRowsBackwardPhase);
        each_gradient(lora[kDown], active_.data(), intermediate, dy_.data(), hidden, of(kDownTensor),
                      [&](int tile, int start, int rows) {
                          float* y = room(scratch().y, kProductRows * kTile);
                          backward_tile(layer.down, intermediate, hidden, lora[kDown], dy_.data(), tile, start, rows, y,
                                        kTile);
                          for (int row = 0; row < rows; row++) {
                              const int64_t at = (start + row) * 2 * intermediate + tile * kTile;
                              swiglu_backward(&saved.gate_up[at], &saved.gate_up[at + intermediate], y + row * kTile,
                                              kTile, &d_gate_up_[at], &d_gate_up_[at + intermediate]);
                          }
                      });
        clock_.end(kProductsBackwardPhase);
        each_rows([&](int start, int rows) {
            norm(saved.middle.data(), layer.post_norm, start, rows, x_.data());
            lora_hidden(kGateUp, x_.data(), hidden, d_gate_up_.data(), 2 * intermediate, start, rows);
        });
        clock_.end(kRowsBackwardPhase);
        each_gradient(lora[kGateUp], x_.data(), hidden, d_gate_up_.data(), 2 * intermediate, of(kGateUpTensor),
                      [&](int tile, int start, int rows) {
                          backward_tile(layer.gate_up, hidden, 2 * intermediate, lora[kGateUp], d_gate_up_.data(), tile,
                                        start, rows, &dx_[start * hidden + tile * kTile], hidden);
                      });
        clock_.end(kProductsBackwardPhase);

        norm_weight_backward(saved.middle.data(), of(kPostNormTensor));
        each_rows([&](int start, int rows) {
            norm_backward(saved.middle.data(), layer.post_norm, start, rows);
            round_to_bf16(&d_residual_[start * hidden], rows * hidden, &dy_[start * hidden]);
            lora_hidden(kO, saved.attn_out.data(), q_, dy_.data(), hidden, start, rows);
        });
        clock_.end(kRowsBackwardPhase);
        each_gradient(lora[kO], saved.attn_out.data(), q_, dy_.data(), hidden, of(kOTensor),
                      [&](int tile, int start, int rows) {
                          float* y = room(scratch().y, kProductRows * kTile);
                          backward_tile(layer.o, q_, hidden, lora[kO], dy_.data(), tile, start, rows, y, kTile);
                          for (int row = 0; row < rows; row++)
                              round_to_bf16(y + row * kTile, kTile, &d_attn_out_[(start + row) * q_ + tile * kTile]);
                      });
        clock_.end(kProductsBackwardPhase);
        team_.each((int)(batch.num_texts * s_.heads), [&](int i) {
            const int head = (int)(i % s_.heads);
            const int64_t text = i / s_.heads, at = batch.starts[text] * q_ + head * dim;
            attend_text_backward(view(saved, batch, text, head), &d_attn_out_[at], q_, &dq_[at], &dk_[at], &dv_[at], q_,
                                 scratch().text);
        });
        clock_.end(kSelfAttentionBackwardPhase);
        each_rows([&](int start, int rows) {
            gather_heads(layer, start, rows);
            norm(saved.in.data(), layer.input_norm, start, rows, x_.data());
            lora_hidden(kQkv, x_.data(), hidden, d_qkv_.data(), wide_, start, rows);
        });
        clock_.end(kRowsBackwardPhase);
        each_gradient(lora[kQkv], x_.data(), hidden, d_qkv_.data(), wide_, of(kQkvTensor),
                      [&](int tile, int start, int rows) {
                          if (is_last) return;
                          backward_tile(layer.qkv, hidden, wide_, lora[kQkv], d_qkv_.data(), tile, start, rows,
                                        &dx_[start * hidden + tile * kTile], hidden);
                      });
        if (is_last) return;
        clock_.end(kProductsBackwardPhase);
        norm_weight_backward(saved.in.data(), of(kInputNormTensor));
        each_rows([&](int start, int rows) { norm_backward(saved.in.data(), layer.input_norm, start, rows); });
    }

    // Beside the items of dx, by tiles of `in`, those of A's and B's gradients, and of W's (out, in) where it is
    // trained, for x (tokens, in) and dy (tokens, out).
    template <class Item>
    void each_gradient(const TrainGroup& lora, const bf16* x, int64_t in, const bf16* dy, int64_t out, float* d_w,
                       Item item) {
        const int products = (int)(in / kTile) * product_chunks_, of_a = lora.rows ? (int)(in / kTile) : 0;
        const int of_b = lora.rows ? (int)(out / kTile) : 0;
        const int pieces = (int)((out + kProductRows - 1) / kProductRows), of_w = d_w ? (int)(in / kTile) * pieces : 0;
        team_.each(products + of_a + of_b + of_w, [&](int i) {
            if (i < products) return product_item(i, item);
            if (i >= products + of_a + of_b) {
                i -= products + of_a + of_b;
                const int64_t column = (int64_t)(i / pieces) * kTile, row = (int64_t)(i % pieces) * kProductRows;
                return multiply_over_tokens<true>(&dy_T_[row * across_], across_,
                                                  (int)std::min<int64_t>(kProductRows, out - row), x, in, column,
                                                  tokens_, d_w + row * in + column, in, scratch().product);
            }
            if (i < products + of_a) {
                const int64_t column = (int64_t)(i - products) * kTile;
                return multiply_over_tokens(d_lora_hidden_T_.data(), across_, (int)lora.rows,
                                            lora.kept ? lora_input_.data() : x, in, column, tokens_, lora.d_a + column,
                                            in, scratch().product);
            }
            const int64_t column = (int64_t)(i - products - of_a) * kTile;
            const TrainModule* module = module_at(lora, column);
            if (module == nullptr) return;
            multiply_over_tokens(&lora_hidden_T_[module->row * across_], across_, (int)module->rank, dy, out, column,
                                 tokens_, lora.d_b + module->row * out + column, out, scratch().product);
        });
    }

    // A tile of x's gradient, from d_lora_hidden_ and dy.
    void backward_tile(const bf16* w, int64_t in, int64_t out, const TrainGroup& lora, const bf16* dy, int tile,
                       int start, int rows, float* y, int64_t y_stride) {
        product_backward(w, in, out, lora, batch_.factor, dy, d_lora_hidden_.data(), tile * kTile, start, rows, y,
                         y_stride, scratch().product);
    }

    // d_lora_hidden_ = dy Bᵀ; both it and x Aᵀ (`lora_hidden`) are kept turned over as well.
    void lora_hidden_backward(const TrainGroup& lora, const bf16* dy, int64_t out, int start, int rows,
                              const bf16* lora_hidden) {
        if (lora.rows == 0) return;
        shrink_backward(lora, dy, out, start, rows, d_lora_hidden_.data(), scratch().product);
        transpose(&d_lora_hidden_[start * lora.rows], lora.rows, rows, (int)lora.rows, &d_lora_hidden_T_[start],
                  across_);
        transpose(lora_hidden + start * lora.rows, lora.rows, rows, (int)lora.rows, &lora_hidden_T_[start], across_);
    }

    // d_residual += the norm's gradient with respect to x, given dx_, the gradient of its output.
    void norm_backward(const float* x, const bf16* weight, int start, int rows) {
        for (int64_t at = start * s_.hidden; at < (start + rows) * s_.hidden; at += s_.hidden)
            rms_norm_backward(x + at, weight, s_.hidden, s_.eps, &dx_[at], &d_residual_[at]);
    }

    // d_weight += the norm's gradient with respect to its weight, given dx_, which norm_backward overwrites.
    void norm_weight_backward(const float* x, float* d_weight) {
        if (d_weight == nullptr) return;
        each_rows([&](int start, int rows) {
            for (int t = start; t < start + rows; t++)
                inverse_rms_[t] = inverse_rms(x + t * s_.hidden, s_.hidden, s_.eps);
        });
        team_.each((int)(s_.hidden / kTile), [&](int tile) {
            add_norm_gradient(x, inverse_rms_.data(), dx_.data(), tokens_, s_.hidden, tile * kTile, d_weight);
        });
    }

    bool trains_base() const { return batch_.d_weights != nullptr; }

    // Where the gradient of a tensor of the base is added up, or null.
    float* gradient(int64_t tensor) const { return trains_base() ? batch_.d_weights[tensor] : nullptr; }

    // d_qkv from dq_, dk_ and dv_, which have a gradient for each query head: rotations are undone, and the gradients
    // of keys and values are summed over the query heads that share them.
    void gather_heads(const TrainLayer& layer, int start, int rows) {
        const int64_t dim = s_.head_dim, group = s_.heads / s_.kv_heads;
        float* sum = room(scratch().y, dim);
        for (int row = start; row < start + rows; row++) {
            bf16* to = &d_qkv_[row * wide_];
            auto gather = [&](const std::vector<float>& d, int64_t head, int64_t heads, bool rotated) {
                sum_rows(&d[row * q_ + head * dim], dim, heads, sum);
                if (rotated && layer.uses_rotary) turn(sum, row, true);
                round_to_bf16(sum, dim, to);
                to += dim;
            };
            for (int64_t head = 0; head < s_.heads; head++) gather(dq_, head, 1, true);
            for (int64_t head = 0; head < s_.heads; head += group) gather(dk_, head, group, true);
            for (int64_t head = 0; head < s_.heads; head += group) gather(dv_, head, group, false);
        }
    }
};

}  // namespace
