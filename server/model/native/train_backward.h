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
            norm_weight_backward(last_, last_rms_, gradient(1 + s_.layers * kLayerTensors));
            each_rows([&](int start, int rows) {
                norm_backward(last_, last_rms_, final_norm_, start, rows);
                down_outputs_backward((int)s_.layers - 1, start, rows);
            });
            clock_.end(kRowsBackwardPhase);
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
    // A group's x (tokens, in) and the gradient of its outputs, dy (tokens, out), with that of its W, which may be
    // null.
    struct Outputs {
        const TrainGroup& lora;
        const bf16* x;
        int64_t in;
        const bf16* dy;
        int64_t out;
        float* d_w;
    };

    void backward(int index, const TrainBatch& batch) {
        const TrainLayer& layer = layers_[index];
        const TrainGroup* lora = batch.lora + index * kGroups;
        const Saved& saved = this->saved(index);
        const int dim = (int)s_.head_dim;
        const int64_t hidden = s_.hidden, intermediate = s_.intermediate;
        const bool is_last = index == 0 && !trains_base();  // embeddings are frozen
        auto of = [&](LayerTensor tensor) { return gradient(1 + index * kLayerTensors + tensor); };

        const Outputs down{lora[kDown], active_.data(), intermediate, dy_.data(), hidden, of(kDownTensor)};
        each_input_and(
            down, num_of_b(down), [&](int i) { b_gradient(down, i); },
            [&](int tile, int start, int rows) {
                float* y = room(scratch().y, kProductRows * kTile);
                backward_tile(layer.down, down, tile, start, rows, y, kTile);
                for (int row = 0; row < rows; row++) {
                    const int64_t at = (start + row) * 2 * intermediate + tile * kTile;
                    swiglu_backward(&saved.gate_up[at], &saved.gate_up[at + intermediate], y + row * kTile, kTile,
                                    &d_gate_up_[at], &d_gate_up_[at + intermediate],
                                    &active_[(start + row) * intermediate + tile * kTile]);
                }
            });
        if (down.lora.kept != nullptr)
            each_rows([&](int start, int rows) { met(down.lora, batch, active_.data(), intermediate, start, rows); });
        begin_w(down);
        team_.each(num_of_a_and_w(down), [&](int i) { a_or_w_gradient(down, i); });
        clock_.end(kProductsBackwardPhase);

        const Outputs gate_up{lora[kGateUp], x_.data(), hidden, d_gate_up_.data(), 2 * intermediate, of(kGateUpTensor)};
        each_rows([&](int start, int rows) {
            norm_again(saved.middle, saved.middle_rms, layer.post_norm, start, rows);
            met(gate_up.lora, batch, x_.data(), hidden, start, rows);
            outputs_backward(gate_up, saved.hidden[kGateUp], start, rows);
        });
        clock_.end(kRowsBackwardPhase);
        each_gradient(gate_up, [&](int tile, int start, int rows) {
            backward_tile(layer.gate_up, gate_up, tile, start, rows, &dx_[start * hidden + tile * kTile], hidden);
        });
        clock_.end(kProductsBackwardPhase);

        const Outputs o{lora[kO], saved.attn_out.data(), q_, dy_.data(), hidden, of(kOTensor)};
        norm_weight_backward(saved.middle, saved.middle_rms, of(kPostNormTensor));
        each_rows([&](int start, int rows) {
            norm_backward(saved.middle, saved.middle_rms, layer.post_norm, start, rows);
            met(o.lora, batch, o.x, q_, start, rows);
            outputs_backward(o, saved.hidden[kO], start, rows);
        });
        clock_.end(kRowsBackwardPhase);
        each_gradient(o, [&](int tile, int start, int rows) {
            float* y = room(scratch().y, kProductRows * kTile);
            backward_tile(layer.o, o, tile, start, rows, y, kTile);
            for (int row = 0; row < rows; row++)
                round_to_bf16(y + row * kTile, kTile, &d_attn_out_[(start + row) * q_ + tile * kTile]);
        });
        clock_.end(kProductsBackwardPhase);
        team_.each((int)(batch.num_texts * s_.heads), [&](int i) {
            const int head = (int)(i % s_.heads);
            const int64_t text = i / s_.heads, start = batch.starts[text], at = (head * tokens_ + start) * dim;
            const Text of = view(saved, batch, text, head);
            float* dq = room(scratch().dq, of.length * dim);
            attend_text_backward(of, &d_attn_out_[start * q_ + head * dim], q_, dq, &dk_[at], &dv_[at], dim,
                                 scratch().text);
            for (int row = 0; row < of.length; row++)
                put_gradient(layer, dq + row * dim, true, start + row, &d_qkv_[(start + row) * wide_ + head * dim]);
        });
        clock_.end(kSelfAttentionBackwardPhase);

        const Outputs qkv{lora[kQkv], x_.data(), hidden, d_qkv_.data(), wide_, of(kQkvTensor)};
        each_rows([&](int start, int rows) {
            gather_heads(layer, start, rows);
            norm_again(saved.in, saved.in_rms, layer.input_norm, start, rows);
            met(qkv.lora, batch, x_.data(), hidden, start, rows);
            outputs_backward(qkv, saved.hidden[kQkv], start, rows);
        });
        clock_.end(kRowsBackwardPhase);
        each_gradient(qkv, [&](int tile, int start, int rows) {
            if (is_last) return;
            backward_tile(layer.qkv, qkv, tile, start, rows, &dx_[start * hidden + tile * kTile], hidden);
        });
        if (is_last) return;
        clock_.end(kProductsBackwardPhase);
        norm_weight_backward(saved.in, saved.in_rms, of(kInputNormTensor));
        each_rows([&](int start, int rows) {
            norm_backward(saved.in, saved.in_rms, layer.input_norm, start, rows);
            if (index > 0) down_outputs_backward(index - 1, start, rows);
        });
        clock_.end(kRowsBackwardPhase);
    }

    // What is known of a layer's down projection as soon as dy_ holds the gradient of its outputs.
    void down_outputs_backward(int index, int start, int rows) {
        const TrainGroup& lora = batch_.lora[index * kGroups + kDown];
        outputs_backward({lora, nullptr, s_.intermediate, dy_.data(), s_.hidden, nullptr}, saved(index).hidden[kDown],
                         start, rows);
    }

    // d_lora_hidden_ = dy Bᵀ; it, x Aᵀ (`lora_hidden`) and, where W is trained, dy are kept turned over as well.
    void outputs_backward(const Outputs& of, const Aligned<bf16>& lora_hidden, int start, int rows) {
        const int64_t r = of.lora.rows;
        if (r > 0) {
            shrink_backward(of.lora, of.dy, of.out, start, rows, d_lora_hidden_.data(), scratch().product);
            transpose(&d_lora_hidden_[start * r], r, rows, (int)r, &d_lora_hidden_T_[start], across_);
            transpose(&lora_hidden[start * r], r, rows, (int)r, &lora_hidden_T_[start], across_);
        }
        if (trains_base()) transpose(of.dy + start * of.out, of.out, rows, (int)of.out, &dy_T_[start], across_);
    }

    // A tile of x's gradient, from d_lora_hidden_ and dy.
    void backward_tile(const bf16* w, const Outputs& of, int tile, int start, int rows, float* y, int64_t y_stride) {
        product_backward(w, of.in, of.out, of.lora, batch_.factor, of.dy, d_lora_hidden_.data(), tile * kTile, start,
                         rows, y, y_stride, scratch().product);
    }

    // Items of x's gradient, by tiles of `in`, beside those of all others.
    template <class Item>
    void each_gradient(const Outputs& of, Item item) {
        const int of_b = num_of_b(of);
        auto other = [&](int i) { i < of_b ? b_gradient(of, i) : a_or_w_gradient(of, i - of_b); };
        each_input_and(of, of_b + num_of_a_and_w(of), other, item);
    }

    // Items of x's gradient beside `others`. Those of adapters are small, and spread evenly between them, so that each
    // thread has neighbouring tiles of W, of which it fetches the next one while it multiplies; those of W follow.
    template <class Other, class Item>
    void each_input_and(const Outputs& of, int others, Other other, Item item) {
        const int64_t products = of.in / kTile * product_chunks_, count = products + others;
        scratch().product.wide.begin(of.in / kTile / s_.threads);
        begin_w(of);
        auto ahead_of = [&](int64_t i) {  // products
            return of.d_w == nullptr ? (i * products + count - 1) / count : std::min(i, products);
        };
        team_.each((int)count, [&](int i) {
            const auto before = (int)ahead_of(i);
            if (ahead_of(i + 1) > before)
                product_item(before, item);
            else
                other(i - before);
        });
    }

    static int num_of_b(const Outputs& of) { return of.lora.rows > 0 ? (int)(of.out / kTile) : 0; }
    void b_gradient(const Outputs& of, int i) {
        const int64_t column = (int64_t)i * kTile;
        const TrainModule* module = module_at(of.lora, column);
        if (module == nullptr) return;
        float* y = room(scratch().y, kTile * module->rank);
        multiply_over_tokens_turned(&lora_hidden_T_[module->row * across_], across_, (int)module->rank, of.dy, of.out,
                                    column, tokens_, y, module->rank, scratch().product);
        add_scaled(y, module->rank, kTile, module->trained, 1,
                   batch_.gradients + module->b_start + (column - module->out_start) * module->trained,
                   module->trained);
    }

    static int num_of_a(const Outputs& of) { return of.lora.rows > 0 ? (int)(of.in / kTile) : 0; }
    void a_gradient(const Outputs& of, int64_t column) {
        const bf16* x = of.lora.kept != nullptr ? lora_input_.data() : of.x;
        float* y = room(scratch().y, of.lora.rows * kTile);
        multiply_over_tokens({d_lora_hidden_T_.data(), (size_t)across_}, (int)of.lora.rows, x, of.in, column, tokens_,
                             y, kTile, scratch().product);
        for (int64_t i = 0; i < of.lora.num_modules; i++) {
            const TrainModule& module = of.lora.modules[i];
            for (int64_t repeat = 0; repeat < module.repeats; repeat++)
                add_scaled(y + (module.row + repeat * module.trained) * kTile, kTile, module.trained, kTile,
                           (float)module.scaling, batch_.gradients + module.a_start + column, of.in);
        }
    }

    // A phase begins that has items of W.
    void begin_w(const Outputs& of) {
        if (of.d_w != nullptr) scratch().product.wide_turned.begin(of.in / kTile / s_.threads);
    }
    static int pieces_of_w(const Outputs& of) { return (int)((of.out + kProductRows - 1) / kProductRows); }
    static int num_of_a_and_w(const Outputs& of) {
        return num_of_a(of) + (of.d_w != nullptr ? (int)(of.in / kTile) * pieces_of_w(of) : 0);
    }
    void a_or_w_gradient(const Outputs& of, int i) {
        if (i < num_of_a(of)) return a_gradient(of, (int64_t)i * kTile);
        i -= num_of_a(of);
        const int64_t column = (int64_t)(i / pieces_of_w(of)) * kTile;
        const int64_t row = (int64_t)(i % pieces_of_w(of)) * kProductRows;
        const int rows = (int)std::min<int64_t>(kProductRows, of.out - row);
        ProductScratch& own = scratch().product;
        multiply_over_tokens<true>(own.wide_turned.rows(dy_T_.data(), across_, (int)row, rows), rows, of.x, of.in,
                                   column, tokens_, of.d_w + row * of.in + column, of.in, own);
    }

    // x_ = what the norm gave in the forward pass.
    void norm_again(const Aligned<float>& x, const Aligned<float>& inverse_rms, const bf16* weight, int start,
                    int rows) {
        for (int row = start; row < start + rows; row++)
            scale_by_weight(&x[row * s_.hidden], inverse_rms[row], weight, s_.hidden, &x_[row * s_.hidden]);
    }

    // d_residual_ += the norm's gradient with respect to x, given dx_, the gradient of its output; dy_ is the same in
    // 16 bits.
    void norm_backward(const Aligned<float>& x, const Aligned<float>& inverse_rms, const bf16* weight, int start,
                       int rows) {
        for (int row = start; row < start + rows; row++) {
            const int64_t at = row * s_.hidden;
            rms_norm_backward(&x[at], inverse_rms[row], weight, s_.hidden, &dx_[at], &d_residual_[at]);
            round_to_bf16(&d_residual_[at], s_.hidden, &dy_[at]);
        }
    }

    // d_weight += the norm's gradient with respect to its weight, given dx_.
    void norm_weight_backward(const Aligned<float>& x, const Aligned<float>& inverse_rms, float* d_weight) {
        if (d_weight == nullptr) return;
        team_.each((int)(s_.hidden / kTile), [&](int tile) {
            add_norm_gradient(x.data(), inverse_rms.data(), dx_.data(), tokens_, s_.hidden, tile * kTile, d_weight);
        });
    }

    bool trains_base() const { return batch_.d_weights != nullptr; }

    // Where the gradient of a tensor of the base is added up, or null.
    float* gradient(int64_t tensor) const { return trains_base() ? batch_.d_weights[tensor] : nullptr; }

    // Those of keys and values in d_qkv_ are the sums of dk_ and dv_ over the query heads that share them.
    void gather_heads(const TrainLayer& layer, int start, int rows) {
        const int64_t dim = s_.head_dim, group = s_.heads / s_.kv_heads, apart = tokens_ * dim;
        float* sum = room(scratch().y, dim);
        for (int64_t head = 0; head < s_.kv_heads; head++)
            for (int row = start; row < start + rows; row++) {
                const int64_t from = head * group * apart + row * dim, to = row * wide_ + q_ + head * dim;
                sum_rows(&dk_[from], apart, dim, group, sum);
                put_gradient(layer, sum, true, row, &d_qkv_[to]);
                sum_rows(&dv_[from], apart, dim, group, sum);
                put_gradient(layer, sum, false, row, &d_qkv_[to + kv_]);
            }
    }

    // A head's in d_qkv_, whose rotation is undone.
    void put_gradient(const TrainLayer& layer, float* d, bool is_rotated, int64_t token, bf16* to) {
        if (is_rotated && layer.uses_rotary) turn(d, (int)token, true);
        round_to_bf16(d, s_.head_dim, to);
    }
};

}  // namespace
