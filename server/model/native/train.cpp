// The forward pass of a training step, from token ids to final hidden states, and its backward pass, from the gradients
// of those to the gradients of the adapter's A and B. For CPUs with AVX-512 and its bf16 products.
//
// The same arithmetic as server/model/smollm.py with server/training/passes/trained_rows.py: what is multiplied is
// bf16, sums, the residual stream and its gradient are fp32. The base's weights are read where they lie. Each number is
// one sum in a fixed order, so that results depend neither on the number of threads nor on chance.
#include "checks.h"
#include "layers.h"
#include "loss.h"
#include "products.h"
#include "team.h"
#include "text_attention.h"

namespace {

constexpr int kRows = 64;  // at most so many rows are one item of work, where rows are computed one by one

struct TrainLayer {
    const bf16 *input_norm, *qkv, *o, *post_norm, *gate_up, *down;
    bool uses_rotary;
};

struct Saved {                                 // of one layer, from the forward pass for the backward pass
    std::vector<float> in, middle;             // the residual stream before attention, and before the feed-forward
    std::vector<bf16> qkv, attn_out, gate_up;  // queries and keys are rotated
    std::vector<bf16> hidden[kGroups];         // x Aᵀ
};

struct alignas(64) TrainScratch {  // of one thread
    ProductScratch product;
    TextScratch text;
    std::vector<float> y;
};

class Training {
  public:
    Training(const BaseSizes& sizes, const bf16* const* tensors, const float* rotary, const uint8_t* uses_rotary)
        : s_(sizes),
          rotary_(rotary),
          team_((int)sizes.threads),
          layers_(sizes.layers),
          saved_(sizes.layers),
          scratch_(sizes.threads) {
        embed_ = *tensors++;
        for (int64_t i = 0; i < s_.layers; i++) {
            TrainLayer& layer = layers_[i];
            layer.uses_rotary = uses_rotary[i];
            for (auto* to : {&layer.input_norm, &layer.qkv, &layer.o, &layer.post_norm, &layer.gate_up, &layer.down})
                *to = *tensors++;
        }
        final_norm_ = *tensors++;
        loss_ = Loss(&team_, *tensors++, s_.vocab, s_.hidden);
        q_ = s_.heads * s_.head_dim, kv_ = s_.kv_heads * s_.head_dim, wide_ = q_ + 2 * kv_;
    }

    // hidden (tokens, hidden): the final hidden states.
    void forward(const TrainBatch& batch, bf16* hidden) {
        has_passed_ = false;
        check_batch(s_, batch);
        batch_ = batch;
        prepare(batch);
        team_.run([&] {
            each_rows([&](int start, int rows) {
                for (int t = start; t < start + rows; t++)
                    for (int64_t i = 0; i < s_.hidden; i += 16)
                        _mm512_storeu_ps(&saved_[0].in[t * s_.hidden + i],
                                         load_bf16(embed_ + batch.token_ids[t] * s_.hidden + i));
            });
            for (int i = 0; i < s_.layers; i++)
                forward(i, batch, i + 1 < s_.layers ? saved_[i + 1].in.data() : last_.data());
            each_rows([&](int start, int rows) { norm(last_.data(), final_norm_, start, rows, hidden); });
        });
        has_passed_ = true;
    }

    // From the gradient of the last `forward`'s answer to those of A and B; once.
    void backward(const bf16* d_hidden) {
        if (!has_passed_) refuse("hidden states must be those of a forward pass that had no backward pass");
        const TrainBatch& batch = batch_;
        team_.run([&] {
            each_rows([&](int start, int rows) {
                for (int64_t i = start * s_.hidden; i < (start + rows) * s_.hidden; i += 16) {
                    _mm512_storeu_ps(&dx_[i], load_bf16(d_hidden + i));
                    _mm512_storeu_ps(&d_residual_[i], _mm512_setzero_ps());
                }
                norm_backward(last_.data(), final_norm_, start, rows);
            });
            for (int i = (int)s_.layers - 1; i >= 0; i--) backward(i, batch);
        });
        has_passed_ = false;
    }

    // See `Loss`.
    double loss(const bf16* hidden, const int64_t* targets, int64_t rows, double factor, bf16* d_hidden) {
        if (rows < 0) refuse("%ld rows", rows);
        check_ids(s_, targets, rows);
        return loss_.run(hidden, targets, rows, factor, d_hidden);
    }

  private:
    // Everything that the phases share, sized for this batch.
    void prepare(const TrainBatch& batch) {
        tokens_ = (int)batch.num_tokens;
        const int64_t t = tokens_;
        for (int64_t i = 0; i < s_.layers; i++) {
            Saved& saved = saved_[i];
            saved.in.resize(t * s_.hidden), saved.middle.resize(t * s_.hidden);
            saved.qkv.resize(t * wide_), saved.attn_out.resize(t * q_), saved.gate_up.resize(t * 2 * s_.intermediate);
            for (int group = 0; group < kGroups; group++)
                saved.hidden[group].resize(t * batch.lora[i * kGroups + group].rows);
        }
        int64_t most = 0;
        for (int64_t i = 0; i < s_.layers * kGroups; i++) most = std::max(most, batch.lora[i].rows);
        across_ = (tokens_ + 31) / 32 * 32;
        lora_hidden_T_.resize(most * across_), d_lora_hidden_T_.resize(most * across_), d_lora_hidden_.resize(most * t);
        last_.resize(t * s_.hidden), d_residual_.resize(t * s_.hidden), dx_.resize(t * s_.hidden);
        x_.resize(t * s_.hidden), dy_.resize(t * s_.hidden), d_attn_out_.resize(t * q_), d_qkv_.resize(t * wide_);
        active_.resize(t * s_.intermediate), d_gate_up_.resize(t * 2 * s_.intermediate);
        lora_input_.resize(t * std::max({s_.hidden, s_.intermediate, q_}));
        for (auto* d : {&dq_, &dk_, &dv_}) d->resize(t * q_);
        positions_.resize(t);
        for (int64_t text = 0; text < batch.num_texts; text++)
            for (int64_t i = batch.starts[text]; i < batch.starts[text + 1]; i++)
                positions_[i] = (int)(i - batch.starts[text]);
        product_chunks_ = (tokens_ + kProductRows - 1) / kProductRows;
        row_chunks_ = (tokens_ + kRows - 1) / kRows;
        row_chunks_ = (row_chunks_ + (int)s_.threads - 1) / (int)s_.threads * (int)s_.threads;
    }

    void forward(int index, const TrainBatch& batch, float* out) {
        const TrainLayer& layer = layers_[index];
        const TrainGroup* lora = batch.lora + index * kGroups;
        Saved& saved = saved_[index];
        const int dim = (int)s_.head_dim, tiles = (int)(s_.intermediate / kTile);
        auto lora_hidden = [&](Group group, const bf16* x, int64_t in, int start, int rows) {
            x = met(lora[group], batch, x, in, start, rows);
            shrink(lora[group], x, in, start, rows, saved.hidden[group].data(), scratch().product);
        };

        each_rows([&](int start, int rows) {
            norm(saved.in.data(), layer.input_norm, start, rows, x_.data());
            lora_hidden(kQkv, x_.data(), s_.hidden, start, rows);
        });
        each_product((int)(wide_ / dim), [&](int head, int start, int rows) {  // an item is a head
            float* y = room(scratch().y, kProductRows * dim);
            for (int i = 0; i < dim; i += kTile)
                product(layer.qkv, s_.hidden, wide_, lora[kQkv], x_.data(), saved.hidden[kQkv].data(), head * dim + i,
                        start, rows, y + i, dim, scratch().product);
            for (int row = 0; row < rows; row++) {
                float* of = y + row * dim;
                if (layer.uses_rotary && head < s_.heads + s_.kv_heads) turn(of, start + row, false);
                round_to_bf16(of, dim, &saved.qkv[(start + row) * wide_ + head * dim]);
            }
        });
        team_.each((int)(batch.num_texts * s_.heads), [&](int i) {
            const int head = (int)(i % s_.heads);
            const int64_t text = i / s_.heads;
            attend_text(view(saved, batch, text, head), &saved.attn_out[batch.starts[text] * q_ + head * dim], q_,
                        scratch().text);
        });
        each_rows([&](int start, int rows) { lora_hidden(kO, saved.attn_out.data(), q_, start, rows); });
        project_residual(layer.o, q_, lora[kO], saved.attn_out.data(), saved.hidden[kO].data(), saved.in.data(),
                         saved.middle.data());

        each_rows([&](int start, int rows) {
            norm(saved.middle.data(), layer.post_norm, start, rows, x_.data());
            lora_hidden(kGateUp, x_.data(), s_.hidden, start, rows);
        });
        each_product(tiles, [&](int tile, int start, int rows) {
            float* y = room(scratch().y, kProductRows * kTile);
            for (int part : {tile, tiles + tile}) {
                product(layer.gate_up, s_.hidden, 2 * s_.intermediate, lora[kGateUp], x_.data(),
                        saved.hidden[kGateUp].data(), part * kTile, start, rows, y, kTile, scratch().product);
                for (int row = 0; row < rows; row++)
                    round_to_bf16(y + row * kTile, kTile,
                                  &saved.gate_up[(start + row) * 2 * s_.intermediate + part * kTile]);
            }
            activate(saved, tile * kTile, kTile, start, rows);
        });
        each_rows([&](int start, int rows) { lora_hidden(kDown, active_.data(), s_.intermediate, start, rows); });
        project_residual(layer.down, s_.intermediate, lora[kDown], active_.data(), saved.hidden[kDown].data(),
                         saved.middle.data(), out);
    }

    void backward(int index, const TrainBatch& batch) {
        const TrainLayer& layer = layers_[index];
        const TrainGroup* lora = batch.lora + index * kGroups;
        const Saved& saved = saved_[index];
        const int dim = (int)s_.head_dim;
        const int64_t hidden = s_.hidden, intermediate = s_.intermediate;
        auto lora_hidden = [&](Group group, const bf16* x, int64_t in, const bf16* dy, int64_t out, int start,
                               int rows) {
            met(lora[group], batch, x, in, start, rows);
            lora_hidden_backward(lora[group], dy, out, start, rows, saved.hidden[group].data());
        };

        each_rows([&](int start, int rows) {
            activate(saved, 0, (int)intermediate, start, rows);
            round_to_bf16(&d_residual_[start * hidden], rows * hidden, &dy_[start * hidden]);
            lora_hidden(kDown, active_.data(), intermediate, dy_.data(), hidden, start, rows);
        });
        each_gradient(
            lora[kDown], active_.data(), intermediate, dy_.data(), hidden, [&](int tile, int start, int rows) {
                float* y = room(scratch().y, kProductRows * kTile);
                backward_tile(layer.down, intermediate, hidden, lora[kDown], dy_.data(), tile, start, rows, y, kTile);
                for (int row = 0; row < rows; row++) {
                    const int64_t at = (start + row) * 2 * intermediate + tile * kTile;
                    swiglu_backward(&saved.gate_up[at], &saved.gate_up[at + intermediate], y + row * kTile, kTile,
                                    &d_gate_up_[at], &d_gate_up_[at + intermediate]);
                }
            });
        each_rows([&](int start, int rows) {
            norm(saved.middle.data(), layer.post_norm, start, rows, x_.data());
            lora_hidden(kGateUp, x_.data(), hidden, d_gate_up_.data(), 2 * intermediate, start, rows);
        });
        each_gradient(lora[kGateUp], x_.data(), hidden, d_gate_up_.data(), 2 * intermediate,
                      [&](int tile, int start, int rows) {
                          backward_tile(layer.gate_up, hidden, 2 * intermediate, lora[kGateUp], d_gate_up_.data(), tile,
                                        start, rows, &dx_[start * hidden + tile * kTile], hidden);
                      });

        each_rows([&](int start, int rows) {
            norm_backward(saved.middle.data(), layer.post_norm, start, rows);
            round_to_bf16(&d_residual_[start * hidden], rows * hidden, &dy_[start * hidden]);
            lora_hidden(kO, saved.attn_out.data(), q_, dy_.data(), hidden, start, rows);
        });
        each_gradient(lora[kO], saved.attn_out.data(), q_, dy_.data(), hidden, [&](int tile, int start, int rows) {
            float* y = room(scratch().y, kProductRows * kTile);
            backward_tile(layer.o, q_, hidden, lora[kO], dy_.data(), tile, start, rows, y, kTile);
            for (int row = 0; row < rows; row++)
                round_to_bf16(y + row * kTile, kTile, &d_attn_out_[(start + row) * q_ + tile * kTile]);
        });
        team_.each((int)(batch.num_texts * s_.heads), [&](int i) {
            const int head = (int)(i % s_.heads);
            const int64_t text = i / s_.heads, at = batch.starts[text] * q_ + head * dim;
            attend_text_backward(view(saved, batch, text, head), &d_attn_out_[at], q_, &dq_[at], &dk_[at], &dv_[at], q_,
                                 scratch().text);
        });
        each_rows([&](int start, int rows) {
            gather_heads(layer, start, rows);
            norm(saved.in.data(), layer.input_norm, start, rows, x_.data());
            lora_hidden(kQkv, x_.data(), hidden, d_qkv_.data(), wide_, start, rows);
        });
        each_gradient(lora[kQkv], x_.data(), hidden, d_qkv_.data(), wide_, [&](int tile, int start, int rows) {
            if (index == 0) return;  // embeddings are frozen
            backward_tile(layer.qkv, hidden, wide_, lora[kQkv], d_qkv_.data(), tile, start, rows,
                          &dx_[start * hidden + tile * kTile], hidden);
        });
        if (index == 0) return;
        each_rows([&](int start, int rows) { norm_backward(saved.in.data(), layer.input_norm, start, rows); });
    }

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

    // item(first row, rows) over the batch, beginning with even rows.
    template <class Item>
    void each_rows(Item item) {
        const int rows = ((tokens_ + row_chunks_ - 1) / row_chunks_ + 1) / 2 * 2;
        team_.each((tokens_ + rows - 1) / rows, [&](int i) { item(i * rows, std::min(rows, tokens_ - i * rows)); });
    }

    // item(column item, first row, rows) over the batch.
    template <class Item>
    void each_product(int columns, Item item) {
        team_.each(columns * product_chunks_, [&](int i) { product_item(i, item); });
    }
    template <class Item>
    void product_item(int i, Item& item) {
        const int rows = (tokens_ + product_chunks_ - 1) / product_chunks_, start = i % product_chunks_ * rows;
        if (start < tokens_) item(i / product_chunks_, start, std::min(rows, tokens_ - start));
    }

    // Beside the items of dx, by tiles of `in`, those of A's and B's gradients, for x (tokens, in) and dy (tokens,
    // out).
    template <class Item>
    void each_gradient(const TrainGroup& lora, const bf16* x, int64_t in, const bf16* dy, int64_t out, Item item) {
        const int products = (int)(in / kTile) * product_chunks_, of_a = lora.rows ? (int)(in / kTile) : 0;
        const int of_b = lora.rows ? (int)(out / kTile) : 0;
        team_.each(products + of_a + of_b, [&](int i) {
            if (i < products) return product_item(i, item);
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

    TrainScratch& scratch() { return scratch_[Team::number()]; }

    // A tile of x's gradient, from d_lora_hidden_ and dy.
    void backward_tile(const bf16* w, int64_t in, int64_t out, const TrainGroup& lora, const bf16* dy, int tile,
                       int start, int rows, float* y, int64_t y_stride) {
        product_backward(w, in, out, lora, batch_.factor, dy, d_lora_hidden_.data(), tile * kTile, start, rows, y,
                         y_stride, scratch().product);
    }

    // What A is multiplied with: x (tokens, in), or with dropout a copy in lora_input_ of which features are dropped.
    const bf16* met(const TrainGroup& lora, const TrainBatch& batch, const bf16* x, int64_t in, int start, int rows) {
        if (lora.kept == nullptr) return x;
        keep(lora.kept, batch.factor, x, in, start, rows, lora_input_.data());
        return lora_input_.data();
    }

    // out = in + x Wᵀ + (x Aᵀ) B, for the two modules that write to the residual stream.
    void project_residual(const bf16* w, int64_t width, const TrainGroup& lora, const bf16* x, const bf16* lora_hidden,
                          const float* in, float* out) {
        each_product((int)(s_.hidden / kTile), [&](int tile, int start, int rows) {
            float* y = room(scratch().y, kProductRows * kTile);
            product(w, width, s_.hidden, lora, x, lora_hidden, tile * kTile, start, rows, y, kTile, scratch().product);
            for (int row = 0; row < rows; row++)
                for (int i = 0; i < kTile; i += 16) {
                    const int64_t at = (start + row) * s_.hidden + tile * kTile + i;
                    _mm512_storeu_ps(out + at,
                                     _mm512_add_ps(_mm512_loadu_ps(in + at), _mm512_loadu_ps(y + row * kTile + i)));
                }
        });
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

    // y = rows of x, divided by their root mean square and times `weight`.
    void norm(const float* x, const bf16* weight, int start, int rows, bf16* y) const {
        for (int64_t at = start * s_.hidden; at < (start + rows) * s_.hidden; at += s_.hidden)
            rms_norm(x + at, weight, s_.hidden, s_.eps, y + at);
    }

    void turn(float* values, int token, bool back) const {
        rotate(values, rotary_, s_.max_positions, s_.head_dim, positions_[token], back);
    }

    // d_residual += the norm's gradient with respect to x, given dx_, the gradient of its output.
    void norm_backward(const float* x, const bf16* weight, int start, int rows) {
        for (int64_t at = start * s_.hidden; at < (start + rows) * s_.hidden; at += s_.hidden)
            rms_norm_backward(x + at, weight, s_.hidden, s_.eps, &dx_[at], &d_residual_[at]);
    }

    // active = silu(gate) · up, for some of its columns
    void activate(const Saved& saved, int column, int columns, int start, int rows) {
        for (int row = start; row < start + rows; row++) {
            const bf16 *gate = &saved.gate_up[row * 2 * s_.intermediate + column], *up = gate + s_.intermediate;
            swiglu(gate, up, columns, &active_[row * s_.intermediate + column]);
        }
    }

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

    const BaseSizes s_;
    int64_t q_, kv_, wide_;  // features of queries, of keys, and of queries, keys and values
    const float* rotary_;    // (2, max_positions, head_dim), as `rotary_table` makes it
    Team team_;
    std::vector<TrainLayer> layers_;
    const bf16 *embed_, *final_norm_;
    Loss loss_;

    int tokens_ = 0, product_chunks_ = 0, row_chunks_ = 0, across_ = 0;  // across: tokens, in thirty-twos
    std::vector<Saved> saved_;
    std::vector<float> last_;             // the residual stream after the last layer
    std::vector<float> d_residual_, dx_;  // the gradients of the residual stream, and of what a norm gave
    std::vector<bf16> x_, active_;        // the newest outputs of a norm and of the activation
    std::vector<bf16> lora_input_;        // the same after dropout, where there is any: what A is multiplied with
    std::vector<bf16> dy_, d_attn_out_, d_qkv_, d_gate_up_;
    std::vector<float> dq_, dk_, dv_;  // (tokens, heads, dim): of each query head
    // Of the newest group: dy Bᵀ (tokens, rows of A), and both x Aᵀ and dy Bᵀ as (rows of A, tokens).
    std::vector<bf16> d_lora_hidden_, lora_hidden_T_, d_lora_hidden_T_;
    std::vector<int> positions_;
    std::vector<TrainScratch> scratch_;
    TrainBatch batch_{};
    bool has_passed_ = false;  // whether `batch_` went forward and not yet backward
};

}  // namespace

int smolora_training_create(const BaseSizes* sizes, const bf16* const* tensors, const float* rotary,
                            const uint8_t* uses_rotary, void** training, char* error) {
    return guarded(error, [&] {
        check_sizes(*sizes);
        *training = new Training(*sizes, tensors, rotary, uses_rotary);
    });
}

void smolora_training_destroy(void* training) { delete (Training*)training; }

int smolora_training_forward(void* training, const TrainBatch* batch, bf16* hidden, char* error) {
    return guarded(error, [&] { ((Training*)training)->forward(*batch, hidden); });
}

int smolora_training_loss(void* training, const bf16* hidden, const int64_t* targets, int64_t rows, double factor,
                          bf16* d_hidden, double* loss, char* error) {
    return guarded(error, [&] { *loss = ((Training*)training)->loss(hidden, targets, rows, factor, d_hidden); });
}

int smolora_training_backward(void* training, const bf16* d_hidden, char* error) {
    return guarded(error, [&] { ((Training*)training)->backward(d_hidden); });
}
