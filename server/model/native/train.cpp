// A training step's forward and backward pass, from token ids to final hidden states and from their gradients to those
// of the adapter's A and B, for CPUs with AVX-512 and its bf16 products.
//
// The same arithmetic as server/model/smollm.py with server/training/trained_rows.py: what is multiplied is bf16, sums,
// the residual stream and its gradient are fp32. The base's weights are read where they lie. Each number is one sum in
// a fixed order, so that results depend neither on the number of threads nor on chance.
#include <new>

#include "layers.h"
#include "loss.h"
#include "team.h"
#include "text_attention.h"

namespace {

constexpr int kProductRows = 256;  // rows of the batch that an item takes of a product, at most
constexpr int kRows = 64;          // rows that an item takes of what goes row by row, at most

struct LoraModule {  // ranks in sixteens; the rest of what the features meet in B is zero
    int64_t row, rank, out_start, out_features;
};

struct Lora {  // one layer's group: A (rows, in), B (rows, out), and where their gradients go
    const bf16 *a, *b;
    float *d_a, *d_b;
    int64_t rows;
    const LoraModule* modules;
    int64_t num_modules;
    const uint8_t* kept;  // (tokens, in): which features of x A meets, or null for all
};

struct Batch {  // texts one after the other; text i has the tokens [starts[i], starts[i + 1])
    int64_t num_tokens, num_texts;
    const int64_t *token_ids, *starts;
    const Lora* lora;  // (layers, kGroups)
    double factor;     // of the features that are kept
};

struct Layer {
    const bf16 *input_norm, *qkv, *o, *post_norm, *gate_up, *down;
    bool uses_rotary;
};

struct Saved {                              // of one layer, from the forward pass for the backward pass
    std::vector<float> in, middle;          // the residual stream before attention and before the feed-forward
    std::vector<bf16> qkv, mixed, gate_up;  // queries and keys are rotated
    std::vector<bf16> hidden[kGroups];      // x Aᵀ
};

class Training {
  public:
    Training(const Sizes& sizes, const bf16* const* tensors, const float* rotary, const uint8_t* uses_rotary)
        : s_(sizes), rotary_(rotary), team_((int)sizes.threads), layers_(sizes.layers), saved_(sizes.layers) {
        embed_ = *tensors++;
        for (int64_t i = 0; i < s_.layers; i++) {
            Layer& layer = layers_[i];
            layer.uses_rotary = uses_rotary[i];
            for (auto* to : {&layer.input_norm, &layer.qkv, &layer.o, &layer.post_norm, &layer.gate_up, &layer.down})
                *to = *tensors++;
        }
        final_norm_ = *tensors++;
        loss_ = Loss(&team_, *tensors++, s_.vocab, s_.hidden);
        q_ = s_.heads * s_.head_dim, kv_ = s_.kv_heads * s_.head_dim, wide_ = q_ + 2 * kv_;
    }

    // hidden (tokens, hidden): the final hidden states.
    void forward(const Batch& batch, bf16* hidden) {
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
    }

    // From the gradient of `forward`'s answer to those of A and B, of the batch that was the last.
    void backward(const Batch& batch, const bf16* d_hidden) {
        team_.run([&] {
            each_rows([&](int start, int rows) {
                for (int64_t i = start * s_.hidden; i < (start + rows) * s_.hidden; i += 16) {
                    _mm512_storeu_ps(&dx_[i], load_bf16(d_hidden + i));
                    _mm512_storeu_ps(&stream_[i], _mm512_setzero_ps());
                }
                norm_backward(last_.data(), final_norm_, start, rows);
            });
            for (int i = (int)s_.layers - 1; i >= 0; i--) backward(i, batch);
        });
    }

    // See `Loss`.
    double loss(const bf16* hidden, const int64_t* targets, int64_t rows, double factor, bf16* d_hidden) {
        return loss_.run(hidden, targets, rows, factor, d_hidden);
    }

  private:
    // Everything that the phases share, sized for this batch.
    void prepare(const Batch& batch) {
        tokens_ = (int)batch.num_tokens;
        const int64_t t = tokens_;
        for (int64_t i = 0; i < s_.layers; i++) {
            Saved& saved = saved_[i];
            saved.in.resize(t * s_.hidden), saved.middle.resize(t * s_.hidden);
            saved.qkv.resize(t * wide_), saved.mixed.resize(t * q_), saved.gate_up.resize(t * 2 * s_.intermediate);
            for (int group = 0; group < kGroups; group++)
                saved.hidden[group].resize(t * batch.lora[i * kGroups + group].rows);
        }
        int64_t most = 0;
        for (int64_t i = 0; i < s_.layers * kGroups; i++) most = std::max(most, batch.lora[i].rows);
        across_ = (tokens_ + 31) / 32 * 32;
        turned_.resize(most * across_), d_turned_.resize(most * across_), d_low_.resize(most * t);
        last_.resize(t * s_.hidden), stream_.resize(t * s_.hidden), dx_.resize(t * s_.hidden);
        x_.resize(t * s_.hidden), dy_.resize(t * s_.hidden), d_mixed_.resize(t * q_), d_qkv_.resize(t * wide_);
        active_.resize(t * s_.intermediate), d_gate_up_.resize(t * 2 * s_.intermediate);
        met_.resize(t * std::max({s_.hidden, s_.intermediate, q_}));
        for (auto* d : {&dq_, &dk_, &dv_}) d->resize(t * q_);
        positions_.resize(t);
        for (int64_t text = 0; text < batch.num_texts; text++)
            for (int64_t i = batch.starts[text]; i < batch.starts[text + 1]; i++)
                positions_[i] = (int)(i - batch.starts[text]);
        product_chunks_ = (tokens_ + kProductRows - 1) / kProductRows;
        row_chunks_ = (tokens_ + kRows - 1) / kRows;
        row_chunks_ = (row_chunks_ + (int)s_.threads - 1) / (int)s_.threads * (int)s_.threads;
    }

    void forward(int index, const Batch& batch, float* out) {
        const Layer& layer = layers_[index];
        const Lora* lora = batch.lora + index * kGroups;
        Saved& saved = saved_[index];
        const int dim = (int)s_.head_dim, tiles = (int)(s_.intermediate / kTile);
        auto low = [&](Group group, const bf16* x, int64_t in, int start, int rows) {
            x = met(lora[group], batch, x, in, start, rows);
            shrink(lora[group], x, in, start, rows, saved.hidden[group].data());
        };

        each_rows([&](int start, int rows) {
            norm(saved.in.data(), layer.input_norm, start, rows, x_.data());
            low(kQkv, x_.data(), s_.hidden, start, rows);
        });
        each_product((int)(wide_ / dim), [&](int head, int start, int rows) {  // an item is a head
            thread_local std::vector<float> y;
            y.resize(kProductRows * dim);
            for (int i = 0; i < dim; i += kTile)
                outputs(layer.qkv, s_.hidden, wide_, lora[kQkv], x_.data(), saved.hidden[kQkv].data(), head * dim + i,
                        start, rows, y.data() + i, dim);
            for (int row = 0; row < rows; row++) {
                float* of = y.data() + row * dim;
                if (layer.uses_rotary && head < s_.heads + s_.kv_heads) turn(of, start + row, false);
                store(of, dim, &saved.qkv[(start + row) * wide_ + head * dim]);
            }
        });
        team_.each((int)(batch.num_texts * s_.heads), [&](int i) {
            const int head = (int)(i % s_.heads);
            const int64_t text = i / s_.heads;
            attend_text(view(saved, batch, text, head), &saved.mixed[batch.starts[text] * q_ + head * dim], q_);
        });
        each_rows([&](int start, int rows) { low(kO, saved.mixed.data(), q_, start, rows); });
        add(layer.o, q_, lora[kO], saved.mixed.data(), saved.hidden[kO].data(), saved.in.data(), saved.middle.data());

        each_rows([&](int start, int rows) {
            norm(saved.middle.data(), layer.post_norm, start, rows, x_.data());
            low(kGateUp, x_.data(), s_.hidden, start, rows);
        });
        each_product(tiles, [&](int tile, int start, int rows) {
            thread_local std::vector<float> y;
            y.resize(kProductRows * kTile);
            for (int part : {tile, tiles + tile}) {
                outputs(layer.gate_up, s_.hidden, 2 * s_.intermediate, lora[kGateUp], x_.data(),
                        saved.hidden[kGateUp].data(), part * kTile, start, rows, y.data(), kTile);
                for (int row = 0; row < rows; row++)
                    store(&y[row * kTile], kTile, &saved.gate_up[(start + row) * 2 * s_.intermediate + part * kTile]);
            }
            activate(saved, tile * kTile, kTile, start, rows);
        });
        each_rows([&](int start, int rows) { low(kDown, active_.data(), s_.intermediate, start, rows); });
        add(layer.down, s_.intermediate, lora[kDown], active_.data(), saved.hidden[kDown].data(), saved.middle.data(),
            out);
    }

    void backward(int index, const Batch& batch) {
        const Layer& layer = layers_[index];
        const Lora* lora = batch.lora + index * kGroups;
        const Saved& saved = saved_[index];
        const int dim = (int)s_.head_dim;
        const int64_t hidden = s_.hidden, intermediate = s_.intermediate;
        auto low = [&](Group group, const bf16* x, int64_t in, const bf16* dy, int64_t out, int start, int rows) {
            met(lora[group], batch, x, in, start, rows);
            shrink_backward(lora[group], dy, out, start, rows, saved.hidden[group].data());
        };

        each_rows([&](int start, int rows) {
            activate(saved, 0, (int)intermediate, start, rows);
            store(&stream_[start * hidden], rows * hidden, &dy_[start * hidden]);
            low(kDown, active_.data(), intermediate, dy_.data(), hidden, start, rows);
        });
        each_gradient(lora[kDown], active_.data(), intermediate, dy_.data(), hidden,
                      [&](int tile, int start, int rows) {
                          thread_local std::vector<float> y;
                          y.resize(kProductRows * kTile);
                          inputs(layer.down, intermediate, hidden, lora[kDown], batch, dy_.data(), tile * kTile, start,
                                 rows, y.data(), kTile);
                          for (int row = 0; row < rows; row++) {
                              const int64_t at = (start + row) * 2 * intermediate + tile * kTile;
                              activate_backward(&saved.gate_up[at], &y[row * kTile], &d_gate_up_[at]);
                          }
                      });
        each_rows([&](int start, int rows) {
            norm(saved.middle.data(), layer.post_norm, start, rows, x_.data());
            low(kGateUp, x_.data(), hidden, d_gate_up_.data(), 2 * intermediate, start, rows);
        });
        each_gradient(lora[kGateUp], x_.data(), hidden, d_gate_up_.data(), 2 * intermediate,
                      [&](int tile, int start, int rows) {
                          inputs(layer.gate_up, hidden, 2 * intermediate, lora[kGateUp], batch, d_gate_up_.data(),
                                 tile * kTile, start, rows, &dx_[start * hidden + tile * kTile], hidden);
                      });

        each_rows([&](int start, int rows) {
            norm_backward(saved.middle.data(), layer.post_norm, start, rows);
            store(&stream_[start * hidden], rows * hidden, &dy_[start * hidden]);
            low(kO, saved.mixed.data(), q_, dy_.data(), hidden, start, rows);
        });
        each_gradient(lora[kO], saved.mixed.data(), q_, dy_.data(), hidden, [&](int tile, int start, int rows) {
            thread_local std::vector<float> y;
            y.resize(kProductRows * kTile);
            inputs(layer.o, q_, hidden, lora[kO], batch, dy_.data(), tile * kTile, start, rows, y.data(), kTile);
            for (int row = 0; row < rows; row++)
                store(&y[row * kTile], kTile, &d_mixed_[(start + row) * q_ + tile * kTile]);
        });
        team_.each((int)(batch.num_texts * s_.heads), [&](int i) {
            const int head = (int)(i % s_.heads);
            const int64_t text = i / s_.heads, at = batch.starts[text] * q_ + head * dim;
            attend_text_backward(view(saved, batch, text, head), &d_mixed_[at], q_, &dq_[at], &dk_[at], &dv_[at], q_);
        });
        each_rows([&](int start, int rows) {
            gather_heads(layer, start, rows);
            norm(saved.in.data(), layer.input_norm, start, rows, x_.data());
            low(kQkv, x_.data(), hidden, d_qkv_.data(), wide_, start, rows);
        });
        each_gradient(lora[kQkv], x_.data(), hidden, d_qkv_.data(), wide_, [&](int tile, int start, int rows) {
            if (index == 0) return;  // embeddings are frozen
            inputs(layer.qkv, hidden, wide_, lora[kQkv], batch, d_qkv_.data(), tile * kTile, start, rows,
                   &dx_[start * hidden + tile * kTile], hidden);
        });
        if (index == 0) return;
        each_rows([&](int start, int rows) { norm_backward(saved.in.data(), layer.input_norm, start, rows); });
    }

    Text view(const Saved& saved, const Batch& batch, int64_t text, int head) const {
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
    void each_gradient(const Lora& lora, const bf16* x, int64_t in, const bf16* dy, int64_t out, Item item) {
        const int products = (int)(in / kTile) * product_chunks_, of_a = lora.rows ? (int)(in / kTile) : 0;
        const int of_b = lora.rows ? (int)(out / kTile) : 0;
        team_.each(products + of_a + of_b, [&](int i) {
            if (i < products) return product_item(i, item);
            thread_local Panel panel;
            panel.resize((tokens_ + 1) / 2 * kTile);
            const int64_t column = (i - products) % std::max(of_a, 1) * kTile;
            if (i < products + of_a) {
                pack_columns((lora.kept ? met_.data() : x) + column, in, tokens_, panel.data());
                multiply(d_turned_.data(), across_, (int)lora.rows, panel, (tokens_ + 1) / 2, lora.d_a + column, in);
                return;
            }
            const int64_t of = (int64_t)(i - products - of_a) * kTile;
            const LoraModule* module = module_at(lora, of);
            if (module == nullptr) return;
            pack_columns(dy + of, out, tokens_, panel.data());
            multiply(&turned_[module->row * across_], across_, (int)module->rank, panel, (tokens_ + 1) / 2,
                     lora.d_b + module->row * out + of, out);
        });
    }

    static const LoraModule* module_at(const Lora& lora, int64_t column) {
        for (int64_t i = 0; i < lora.num_modules; i++) {
            const LoraModule& module = lora.modules[i];
            if (column >= module.out_start && column < module.out_start + module.out_features) return &module;
        }
        return nullptr;
    }

    // y (rows, 32): outputs [column, column + 32) of x Wᵀ + (x Aᵀ) B.
    void outputs(const bf16* w, int64_t in, int64_t out, const Lora& lora, const bf16* x, const bf16* low,
                 int64_t column, int start, int rows, float* y, int64_t y_stride) {
        thread_local Panel panel;
        panel.resize(in / 2 * kTile);
        pack_rows(w + column * in, in, kTile, (int)in, panel.data());
        multiply(x + start * in, in, rows, panel, (int)in / 2, y, y_stride);
        const LoraModule* module = module_at(lora, column);
        if (module == nullptr) return;
        panel.resize(std::max<int64_t>(in, module->rank) / 2 * kTile);
        pack_columns(lora.b + module->row * out + column, out, (int)module->rank, panel.data());
        multiply<true>(low + start * lora.rows + module->row, lora.rows, rows, panel, (int)module->rank / 2, y,
                       y_stride);
    }

    // y (rows, 32): features [column, column + 32) of dy W + (dy Bᵀ) A.
    void inputs(const bf16* w, int64_t in, int64_t out, const Lora& lora, const Batch& batch, const bf16* dy,
                int64_t column, int start, int rows, float* y, int64_t y_stride) {
        thread_local Panel panel;
        panel.resize(std::max(out, lora.rows) / 2 * kTile);
        pack_columns(w + column, in, (int)out, panel.data());
        multiply(dy + start * out, out, rows, panel, (int)out / 2, y, y_stride);
        if (lora.rows == 0) return;
        const bf16* low = &d_low_[start * lora.rows];
        const int pairs = (int)lora.rows / 2;
        pack_columns(lora.a + column, in, (int)lora.rows, panel.data());
        if (lora.kept == nullptr) return multiply<true>(low, lora.rows, rows, panel, pairs, y, y_stride);
        thread_local std::vector<float> share;
        share.resize(kProductRows * kTile);
        multiply(low, lora.rows, rows, panel, pairs, share.data(), kTile);
        const __m512 factor = _mm512_set1_ps((float)batch.factor);
        for (int row = 0; row < rows; row++)
            for (int i = 0; i < kTile; i += 16) {
                float* to = y + row * y_stride + i;
                const __m512 more = _mm512_mul_ps(_mm512_loadu_ps(&share[row * kTile + i]), factor);
                const __mmask16 kept = are_kept(lora.kept + (start + row) * in + column + i);
                _mm512_storeu_ps(to, _mm512_mask_add_ps(_mm512_loadu_ps(to), kept, _mm512_loadu_ps(to), more));
            }
    }

    static __mmask16 are_kept(const uint8_t* flags) {  // of sixteen
        const __m128i x = _mm_loadu_si128((const __m128i*)flags);
        return _mm_test_epi8_mask(x, x);
    }

    // What A meets of x (tokens, in): x itself, or the features that dropout keeps, put into met_.
    const bf16* met(const Lora& lora, const Batch& batch, const bf16* x, int64_t in, int start, int rows) {
        if (lora.kept == nullptr) return x;
        const __m512 factor = _mm512_set1_ps((float)batch.factor);
        for (int64_t i = start * in; i < (start + rows) * in; i += 16)
            store_bf16(&met_[i], _mm512_maskz_mul_ps(are_kept(lora.kept + i), load_bf16(x + i), factor));
        return met_.data();
    }

    // out = in + x Wᵀ + (x Aᵀ) B, for the two modules that write to the residual stream.
    void add(const bf16* w, int64_t width, const Lora& lora, const bf16* x, const bf16* low, const float* in,
             float* out) {
        each_product((int)(s_.hidden / kTile), [&](int tile, int start, int rows) {
            thread_local std::vector<float> y;
            y.resize(kProductRows * kTile);
            outputs(w, width, s_.hidden, lora, x, low, tile * kTile, start, rows, y.data(), kTile);
            for (int row = 0; row < rows; row++)
                for (int i = 0; i < kTile; i += 16) {
                    const int64_t at = (start + row) * s_.hidden + tile * kTile + i;
                    _mm512_storeu_ps(out + at,
                                     _mm512_add_ps(_mm512_loadu_ps(in + at), _mm512_loadu_ps(&y[row * kTile + i])));
                }
        });
    }

    // low (tokens, rows of A) = x Aᵀ
    static void shrink(const Lora& lora, const bf16* x, int64_t in, int start, int rows, bf16* low) {
        thread_local Panel panel;
        for (int64_t row = 0; row < lora.rows; row += kTile)
            low_rank(lora.a + row * in, in, (int)std::min<int64_t>(kTile, lora.rows - row), in, x + start * in, in,
                     rows, panel, low + start * lora.rows + row, lora.rows);
    }

    // d_low = dy Bᵀ; both it and x Aᵀ (`low`) are kept turned over as well.
    void shrink_backward(const Lora& lora, const bf16* dy, int64_t out, int start, int rows, const bf16* low) {
        if (lora.rows == 0) return;
        thread_local Panel panel;
        for (int64_t i = 0; i < lora.num_modules; i++) {
            const LoraModule& module = lora.modules[i];
            for (int64_t row = 0; row < module.rank; row += kTile)
                low_rank(lora.b + (module.row + row) * out + module.out_start, out,
                         (int)std::min<int64_t>(kTile, module.rank - row), module.out_features,
                         dy + start * out + module.out_start, out, rows, panel,
                         &d_low_[start * lora.rows + module.row + row], lora.rows);
        }
        transpose(&d_low_[start * lora.rows], lora.rows, rows, (int)lora.rows, &d_turned_[start], across_);
        transpose(low + start * lora.rows, lora.rows, rows, (int)lora.rows, &turned_[start], across_);
    }

    // y (rows, outputs) = x (rows, depth) times `outputs` rows of w, 16 or 32.
    static void low_rank(const bf16* w, int64_t w_stride, int outputs, int64_t depth, const bf16* x, int64_t x_stride,
                         int rows, Panel& panel, bf16* y, int64_t y_stride) {
        thread_local std::vector<float> sums;
        sums.resize(rows * kTile);
        panel.resize(depth / 2 * kTile);
        pack_rows(w, w_stride, outputs, (int)depth, panel.data());
        multiply(x, x_stride, rows, panel, (int)depth / 2, sums.data(), kTile);
        for (int row = 0; row < rows; row++) store(&sums[row * kTile], outputs, y + row * y_stride);
    }

    static void store(const float* from, int64_t count, bf16* to) {
        for (int64_t i = 0; i < count; i += 16) store_bf16(to + i, _mm512_loadu_ps(from + i));
    }

    // y = rows of x, divided by their root mean square and times `weight`.
    void norm(const float* x, const bf16* weight, int start, int rows, bf16* y) const {
        for (int64_t at = start * s_.hidden; at < (start + rows) * s_.hidden; at += s_.hidden)
            rms_norm(x + at, weight, s_.hidden, s_.eps, y + at);
    }

    void turn(float* values, int token, bool back) const {
        rotate(values, rotary_, s_.max_positions, s_.head_dim, positions_[token], back);
    }

    // stream += the norm's gradient in its rows of x, from `dx_`: (g - n · mean(g · n)) / rms for n = x / rms, g = dx ·
    // weight.
    void norm_backward(const float* x, const bf16* weight, int start, int rows) {
        for (int64_t at = start * s_.hidden; at < (start + rows) * s_.hidden; at += s_.hidden) {
            const __m512 by = _mm512_set1_ps(inverse_rms(x + at, s_.hidden, s_.eps));
            __m512 sum = _mm512_setzero_ps();
            for (int64_t i = 0; i < s_.hidden; i += 16) {
                __m512 g = _mm512_mul_ps(_mm512_loadu_ps(&dx_[at + i]), load_bf16(weight + i));
                _mm512_storeu_ps(&dx_[at + i], g);
                sum = _mm512_fmadd_ps(g, _mm512_mul_ps(_mm512_loadu_ps(x + at + i), by), sum);
            }
            const __m512 mean = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_add_ps(sum) / s_.hidden), by);
            for (int64_t i = 0; i < s_.hidden; i += 16) {
                __m512 d = _mm512_fnmadd_ps(_mm512_loadu_ps(x + at + i), mean, _mm512_loadu_ps(&dx_[at + i]));
                _mm512_storeu_ps(&stream_[at + i], _mm512_fmadd_ps(d, by, _mm512_loadu_ps(&stream_[at + i])));
            }
        }
    }

    // active = silu(gate) · up, for some of its columns
    void activate(const Saved& saved, int column, int columns, int start, int rows) {
        for (int row = start; row < start + rows; row++) {
            const bf16 *gate = &saved.gate_up[row * 2 * s_.intermediate + column], *up = gate + s_.intermediate;
            for (int i = 0; i < columns; i += 16) {
                __m512 g = load_bf16(gate + i);
                store_bf16(&active_[row * s_.intermediate + column + i], _mm512_mul_ps(silu(g), load_bf16(up + i)));
            }
        }
    }

    // The gradients of a tile of gate and of up from that of active.
    void activate_backward(const bf16* gate, const float* d_active, bf16* d_gate) const {
        for (int i = 0; i < kTile; i += 16) {
            __m512 g = load_bf16(gate + i), u = load_bf16(gate + s_.intermediate + i),
                   d = _mm512_loadu_ps(d_active + i);
            __m512 share = sigmoid(g), gated = _mm512_mul_ps(g, share);
            // silu' = share · (1 + g · (1 - share))
            __m512 slope = _mm512_fmadd_ps(gated, _mm512_sub_ps(_mm512_set1_ps(1), share), share);
            store_bf16(d_gate + i, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
            store_bf16(d_gate + s_.intermediate + i, _mm512_mul_ps(d, gated));
        }
    }

    // d_qkv, from each query head's gradients: turned back, those of keys and values summed over the heads that share
    // them.
    void gather_heads(const Layer& layer, int start, int rows) {
        const int64_t dim = s_.head_dim, group = s_.heads / s_.kv_heads;
        thread_local std::vector<float> sum;
        sum.resize(dim);
        for (int row = start; row < start + rows; row++) {
            bf16* to = &d_qkv_[row * wide_];
            auto gather = [&](const std::vector<float>& d, int64_t head, int64_t heads, bool rotated) {
                const float* from = &d[row * q_ + head * dim];
                for (int64_t i = 0; i < dim; i += 16) {
                    __m512 all = _mm512_loadu_ps(from + i);
                    for (int64_t h = 1; h < heads; h++) all = _mm512_add_ps(all, _mm512_loadu_ps(from + h * dim + i));
                    _mm512_storeu_ps(&sum[i], all);
                }
                if (rotated && layer.uses_rotary) turn(sum.data(), row, true);
                store(sum.data(), dim, to);
                to += dim;
            };
            for (int64_t head = 0; head < s_.heads; head++) gather(dq_, head, 1, true);
            for (int64_t head = 0; head < s_.heads; head += group) gather(dk_, head, group, true);
            for (int64_t head = 0; head < s_.heads; head += group) gather(dv_, head, group, false);
        }
    }

    const Sizes s_;
    int64_t q_, kv_, wide_;  // features of queries, of keys, and of queries, keys and values
    const float* rotary_;    // (2, max_positions, head_dim), as `rotary_table` makes it
    Team team_;
    std::vector<Layer> layers_;
    const bf16 *embed_, *final_norm_;
    Loss loss_;

    int tokens_ = 0, product_chunks_ = 0, row_chunks_ = 0, across_ = 0;  // across: tokens, in thirty-twos
    std::vector<Saved> saved_;
    std::vector<float> last_;             // the residual stream after the last layer
    std::vector<float> stream_, dx_;      // the gradients of the residual stream, and of what a norm gave
    std::vector<bf16> x_, active_, met_;  // what a norm and the activation gave, and what A met of it, the newest
    std::vector<bf16> dy_, d_mixed_, d_qkv_, d_gate_up_;
    std::vector<float> dq_, dk_, dv_;              // (tokens, heads, dim): of each query head
    std::vector<bf16> d_low_, turned_, d_turned_;  // of the newest group: dy Bᵀ; x Aᵀ and dy Bᵀ as (rows of A, tokens)
    std::vector<int> positions_;
};

template <class Call>
int is_done(Call call) {
    try {
        call();
    } catch (const std::bad_alloc&) {
        return 0;
    }
    return 1;
}

}  // namespace

extern "C" {

// tensors: embed, then of each layer input_norm, qkv, o, post_norm, gate_up and down, then final_norm and lm_head; they
// and rotary stay the caller's, and must stay.
void* smolora_training_create(const Sizes* sizes, const bf16* const* tensors, const float* rotary,
                              const uint8_t* uses_rotary) {
    try {
        return new Training(*sizes, tensors, rotary, uses_rotary);
    } catch (const std::exception&) {
        return nullptr;
    }
}

void smolora_training_destroy(void* training) { delete (Training*)training; }

// The others answer 0 where there is no memory for the batch, else 1.

int smolora_training_forward(void* training, const Batch* batch, bf16* hidden) {
    return is_done([&] { ((Training*)training)->forward(*batch, hidden); });
}

int smolora_training_loss(void* training, const bf16* hidden, const int64_t* targets, int64_t rows, double factor,
                          bf16* d_hidden, double* loss) {
    return is_done([&] { *loss = ((Training*)training)->loss(hidden, targets, rows, factor, d_hidden); });
}

int smolora_training_backward(void* training, const Batch* batch, const bf16* d_hidden) {
    return is_done([&] { ((Training*)training)->backward(*batch, d_hidden); });
}
}
