// Training: a micro-batch's forward pass, its loss, and its backward pass to the gradients of the adapter's A and B, or
// of all weights.
//
// It computes what server/model/smollm.py computes with trained rows: operands of products are bf16; sums, the residual
// stream and its gradient are fp32. The base's weights are read in place. Each number is one sum in a fixed order, so
// results are deterministic and don't depend on the number of threads.
#include <algorithm>
#include <vector>

#include "kernels/layers.h"
#include "kernels/loss.h"
#include "kernels/phases.h"
#include "kernels/products.h"
#include "kernels/team.h"
#include "kernels/training_attention.h"
#include "seam/checks.h"

namespace {

constexpr int kRows = 64;  // rows in an item of a phase that computes row by row, at most

using TrainClock = PhaseClock<TrainPhase, kTrainPhases>;

struct TrainLayer {
    const bf16 *input_norm, *qkv, *o, *post_norm, *gate_up, *down;
    bool uses_rotary;
};

struct Saved {                             // one layer's activations, saved by the forward pass for the backward pass
    Aligned<float> in, middle;             // the residual stream before attention, and before the feed-forward
    Aligned<float> in_rms, middle_rms;     // 1 / the root mean square of each of their rows
    Aligned<bf16> qkv, attn_out, gate_up;  // queries and keys are rotated
    Aligned<bf16> lora_hidden[kGroups];    // x Aᵀ
    Aligned<uint16_t> kept[kGroups];       // the features of x that dropout keeps, if there is any: see `draw_kept`
};

class Training {
  public:
    Training(const BaseSizes& sizes, const BaseTensor* tensors, const float* rotary, const uint8_t* uses_rotary)
        : sizes_(sizes),
          head_dim_(static_cast<int>(sizes.head_dim)),
          q_size_(sizes.heads * sizes.head_dim),
          kv_size_(sizes.kv_heads * sizes.head_dim),
          qkv_size_(q_size_ + 2 * kv_size_),
          inputs_{sizes.hidden, q_size_, sizes.hidden, sizes.intermediate},
          rotary_(rotary),
          team_(static_cast<int>(sizes.threads)),
          layers_(sizes.layers),
          embed_(tensors[0].values),
          final_norm_(tensors[final_norm()].values),
          loss_(&team_, tensors[final_norm() + 1].values, sizes.vocab, sizes.hidden),
          saved_(sizes.layers),
          scratch_(sizes.threads) {
        const BaseTensor* tensor = tensors + 1;
        for (int64_t i = 0; i < sizes.layers; i++) {
            TrainLayer& layer = layers_[i];
            layer.uses_rotary = uses_rotary[i];
            for (auto* values :
                 {&layer.input_norm, &layer.qkv, &layer.o, &layer.post_norm, &layer.gate_up, &layer.down})
                *values = tensor++->values;
        }
    }

    // hidden (tokens, hidden): the final hidden states.
    void forward(const TrainBatch& batch, bf16* hidden) {
        may_go_backward_ = false;
        clock_.begin();
        check_batch(sizes_, batch);
        batch_ = batch;
        prepare();
        team_.run([&] {
            each_rows([&](int start, int rows) { embed(start, rows, saved(0).in.data()); });
            for (int i = 0; i < sizes_.layers; i++)
                forward_layer(i, i + 1 < sizes_.layers ? saved(i + 1).in.data() : last_.data());
            each_rows(
                [&](int start, int rows) { norm(last_.data(), final_norm_, start, rows, hidden, last_rms_.data()); });
        });
        clock_.end(kRowsPhase);
        may_go_backward_ = batch.has_backward != 0;
    }

    // See `Loss::run`.
    double loss(const bf16* hidden, const int64_t* targets, int64_t rows, double factor, bf16* d_hidden,
                float* d_head) {
        if (rows < 0) refuse("%ld rows", rows);
        check_ids(sizes_, targets, rows);
        clock_.begin();
        const double loss = loss_.run(hidden, targets, rows, factor, d_hidden, d_head);
        clock_.end(kLossPhase);
        return loss;
    }

    // See `Loss::measure`.
    void measure(const bf16* hidden, const int64_t* targets, int64_t rows, double* losses, int64_t* likeliest) {
        if (rows < 0) refuse("%ld rows", rows);
        check_ids(sizes_, targets, rows);
        clock_.begin();
        loss_.measure(hidden, targets, rows, losses, likeliest);
        clock_.end(kLossPhase);
    }

    // Adds the gradients of A and B, and of the base if that is trained, given the gradient of the last `forward`'s
    // hidden states; at most once after each `forward`.
    void backward(const bf16* d_hidden) {
        if (!may_go_backward_) refuse("hidden states must be those of a forward pass that had no backward pass");
        clock_.begin();
        team_.run([&] {
            float* const d_embed = d_weight(0);  // read here, since nothing may follow a job's last phase
            each_rows([&](int start, int rows) {
                for (int64_t i = start * sizes_.hidden; i < (start + rows) * sizes_.hidden; i += 16) {
                    store(&dx_[i], load_bf16(d_hidden + i));
                    store(&d_residual_[i], F32x16{});
                }
            });
            norm_weight_backward(last_, last_rms_, d_weight(final_norm()));
            each_rows([&](int start, int rows) {
                norm_backward(last_, last_rms_, final_norm_, start, rows);
                down_outputs_backward(static_cast<int>(sizes_.layers) - 1, start, rows);
            });
            clock_.end(kRowsBackwardPhase);
            for (int i = static_cast<int>(sizes_.layers) - 1; i >= 0; i--) backward_layer(i);
            if (d_embed != nullptr)
                team_.each(static_cast<int>(sizes_.hidden / kTile), [&](int tile) {
                    add_embedding_gradient(d_residual_.data(), batch_.token_ids, num_tokens_, sizes_.hidden,
                                           tile * kTile, d_embed);
                });
        });
        clock_.end(kProductsBackwardPhase);
        may_go_backward_ = false;
    }

    TrainClock& clock() { return clock_; }

  private:
    struct alignas(64) TrainScratch {  // one thread's
        ProductScratch product;
        TextScratch text;
        Aligned<float> y, dq;
    };
    TrainScratch& scratch() { return scratch_[Team::number()]; }

    // The index of the final norm's weight among the base's tensors.
    int64_t final_norm() const { return 1 + sizes_.layers * kLayerTensors; }

    // Resizes the buffers for this batch.
    void prepare() {
        num_tokens_ = static_cast<int>(batch_.num_tokens);
        const int64_t t = num_tokens_;
        for (int64_t i = 0; i < sizes_.layers; i++) {
            Saved& saved = this->saved(i);
            for (auto* residual : {&saved.in, &saved.middle}) room(*residual, t * sizes_.hidden);
            for (auto* rms : {&saved.in_rms, &saved.middle_rms}) room(*rms, t);
            room(saved.qkv, t * qkv_size_);
            room(saved.attn_out, t * q_size_);
            room(saved.gate_up, t * 2 * sizes_.intermediate);
            for (int group = 0; group < kGroups; group++) {
                const int64_t rows = batch_.lora[i * kGroups + group].rows;
                room(saved.lora_hidden[group], t * rows);
                if (has_dropout() && rows > 0) room(saved.kept[group], t * inputs_[group] / 16);
            }
        }
        room(last_, t * sizes_.hidden);
        room(last_rms_, t);
        room(x_, t * sizes_.hidden);
        room(active_, t * sizes_.intermediate);
        if (has_dropout()) room(lora_input_, t * std::max({sizes_.hidden, sizes_.intermediate, q_size_}));
        if (batch_.has_backward) prepare_backward();
        positions_.resize(t);
        for (int64_t text = 0; text < batch_.num_texts; text++)
            for (int64_t i = batch_.starts[text]; i < batch_.starts[text + 1]; i++)
                positions_[i] = static_cast<int>(i - batch_.starts[text]);
        const int threads = team_.size();
        row_chunks_ = (num_tokens_ + kRows - 1) / kRows;
        product_chunks_ = std::max((num_tokens_ + kProductRows - 1) / kProductRows, std::min(threads / 4, row_chunks_));
        row_chunks_ = (row_chunks_ + threads - 1) / threads * threads;
    }

    void prepare_backward() {
        const int64_t t = num_tokens_;
        int64_t max_rows = 0;
        for (int64_t i = 0; i < sizes_.layers * kGroups; i++) max_rows = std::max(max_rows, batch_.lora[i].rows);
        token_stride_ = (num_tokens_ + 31) / 32 * 32;
        for (auto* transposed : {&lora_hidden_T_, &d_lora_hidden_T_}) room(*transposed, max_rows * token_stride_);
        if (trains_base()) room(dy_T_, std::max({qkv_size_, sizes_.hidden, 2 * sizes_.intermediate}) * token_stride_);
        for (auto* d : {&d_residual_, &dx_}) room(*d, t * sizes_.hidden);
        for (auto* d : {&dk_, &dv_}) room(*d, t * q_size_);
        room(d_lora_hidden_, max_rows * t);
        room(dy_, t * sizes_.hidden);
        room(d_attn_out_, t * q_size_);
        room(d_qkv_, t * qkv_size_);
        room(d_gate_up_, t * 2 * sizes_.intermediate);
    }

    // A layer's saved activations. Without a backward pass, all layers use the first one's.
    Saved& saved(int64_t layer) { return saved_[batch_.has_backward ? layer : 0]; }

    bool has_dropout() const { return batch_.dropout_keys != nullptr; }
    bool trains_base() const { return batch_.d_weights != nullptr; }

    // The sum of a base tensor's gradient, or null if it isn't trained.
    float* d_weight(int64_t tensor) const { return trains_base() ? batch_.d_weights[tensor] : nullptr; }

    // Calls item(first row, rows) for all rows of the batch. First rows are even.
    template <class Item>
    void each_rows(Item item) {
        const int rows = ((num_tokens_ + row_chunks_ - 1) / row_chunks_ + 1) / 2 * 2;
        team_.each((num_tokens_ + rows - 1) / rows,
                   [&](int i) { item(i * rows, std::min(rows, num_tokens_ - i * rows)); });
    }

    // Calls item(column item, first row, rows) for all columns and rows of the batch.
    template <class Item>
    void each_product(int columns, Item item) {
        scratch().product.wide.begin(columns / team_.size());
        team_.each(columns * product_chunks_, [&](int i) { product_item(i, item); });
    }
    template <class Item>
    void product_item(int i, Item& item) {
        const int rows = (num_tokens_ + product_chunks_ - 1) / product_chunks_, start = i % product_chunks_ * rows;
        if (start < num_tokens_) item(i / product_chunks_, start, std::min(rows, num_tokens_ - start));
    }

    // Calls item(text, query head) for all of the batch.
    template <class Item>
    void each_head(Item item) {
        team_.each(static_cast<int>(batch_.num_texts * sizes_.heads),
                   [&](int i) { item(i / sizes_.heads, static_cast<int>(i % sizes_.heads)); });
    }

    // One query head of a text, as attention reads it.
    Text text_of(const Saved& saved, int64_t text, int head) const {
        const int64_t start = batch_.starts[text], kv_head = head / (sizes_.heads / sizes_.kv_heads);
        const bf16* row = &saved.qkv[start * qkv_size_];
        return {row + head * head_dim_,
                row + q_size_ + kv_head * head_dim_,
                row + q_size_ + kv_size_ + kv_head * head_dim_,
                static_cast<size_t>(qkv_size_),
                static_cast<int>(batch_.starts[text + 1] - start),
                head_dim_};
    }

    void rotate_head(float* values, int64_t token, bool back) const {
        rotate(values, rotary_, sizes_.max_positions, head_dim_, positions_[token], back);
    }

    // The mask of a group of a layer, or null if nothing of its input is dropped.
    uint16_t* kept(int layer, Group group) {
        const bool is_masked = has_dropout() && batch_.lora[layer * kGroups + group].rows > 0;
        return is_masked ? saved(layer).kept[group].data() : nullptr;
    }

    // A's input: x (tokens, in), or its copy in lora_input_ after dropout.
    const bf16* drop(const uint16_t* kept, const bf16* x, int64_t in, int start, int rows) {
        if (kept == nullptr) return x;
        keep(kept, batch_.factor, x, in, start, rows, lora_input_.data());
        return lora_input_.data();
    }

    // The forward pass.

    void embed(int start, int rows, float* residual) const {
        for (int t = start; t < start + rows; t++)
            for (int64_t i = 0; i < sizes_.hidden; i += 16)
                store(&residual[t * sizes_.hidden + i], load_bf16(embed_ + batch_.token_ids[t] * sizes_.hidden + i));
    }

    // y = the RMSNorm of rows of x, with `weight`. inverse_rms gets each row's 1 / rms(x).
    void norm(const float* x, const bf16* weight, int start, int rows, bf16* y, float* inverse_rms) const {
        for (int row = start; row < start + rows; row++)
            inverse_rms[row] =
                rms_norm(x + row * sizes_.hidden, weight, sizes_.hidden, sizes_.eps, y + row * sizes_.hidden);
    }

    // Computes a layer from its saved `in`; `out` is the next layer's.
    void forward_layer(int index, float* out) {
        const TrainLayer& layer = layers_[index];
        const TrainGroup* lora = batch_.lora + index * kGroups;
        Saved& saved = this->saved(index);
        const int64_t hidden = sizes_.hidden, intermediate = sizes_.intermediate;
        auto shrink_group = [&](Group group, const bf16* x, int64_t in, int start, int rows) {
            uint16_t* const kept = this->kept(index, group);
            if (kept != nullptr)
                draw_kept(batch_.dropout_keys, index * kGroups + group, batch_.num_dropped, in, start, rows, kept);
            x = drop(kept, x, in, start, rows);
            shrink(lora[group], x, in, start, rows, saved.lora_hidden[group].data(), scratch().product);
        };

        each_rows([&](int start, int rows) {
            norm(saved.in.data(), layer.input_norm, start, rows, x_.data(), saved.in_rms.data());
            shrink_group(kQkv, x_.data(), hidden, start, rows);
        });
        clock_.end(kRowsPhase);
        each_product(static_cast<int>(qkv_size_ / head_dim_), [&](int head, int start, int rows) {
            float* y = room(scratch().y, kProductRows * head_dim_);
            for (int i = 0; i < head_dim_; i += kTile)
                product(layer.qkv, hidden, qkv_size_, lora[kQkv], x_.data(), saved.lora_hidden[kQkv].data(),
                        head * head_dim_ + i, start, rows, y + i, head_dim_, scratch().product);
            for (int row = 0; row < rows; row++) {
                float* values = y + row * head_dim_;
                if (layer.uses_rotary && head < sizes_.heads + sizes_.kv_heads) rotate_head(values, start + row, false);
                round_to_bf16(values, head_dim_, &saved.qkv[(start + row) * qkv_size_ + head * head_dim_]);
            }
        });
        clock_.end(kProductsPhase);
        each_head([&](int64_t text, int head) {
            attend_text(text_of(saved, text, head), &saved.attn_out[batch_.starts[text] * q_size_ + head * head_dim_],
                        q_size_, scratch().text);
        });
        clock_.end(kSelfAttentionPhase);
        each_rows([&](int start, int rows) { shrink_group(kO, saved.attn_out.data(), q_size_, start, rows); });
        clock_.end(kRowsPhase);
        project_residual(layer.o, q_size_, lora[kO], saved.attn_out.data(), saved.lora_hidden[kO].data(),
                         saved.in.data(), saved.middle.data());
        clock_.end(kProductsPhase);

        each_rows([&](int start, int rows) {
            norm(saved.middle.data(), layer.post_norm, start, rows, x_.data(), saved.middle_rms.data());
            shrink_group(kGateUp, x_.data(), hidden, start, rows);
        });
        clock_.end(kRowsPhase);
        each_product(static_cast<int>(intermediate / kTile), [&](int tile, int start, int rows) {
            float *gate = room(scratch().y, 2 * kProductRows * kTile), *up = gate + kProductRows * kTile;
            for (bool is_up : {false, true})
                product(layer.gate_up, hidden, 2 * intermediate, lora[kGateUp], x_.data(),
                        saved.lora_hidden[kGateUp].data(), (is_up ? intermediate : 0) + tile * kTile, start, rows,
                        is_up ? up : gate, kTile, scratch().product);
            for (int row = 0; row < rows; row++) {
                bf16* gate_up = &saved.gate_up[(start + row) * 2 * intermediate + tile * kTile];
                round_to_bf16(gate + row * kTile, kTile, gate_up);
                round_to_bf16(up + row * kTile, kTile, gate_up + intermediate);
                swiglu(gate_up, gate_up + intermediate, kTile, &active_[(start + row) * intermediate + tile * kTile]);
            }
        });
        clock_.end(kProductsPhase);
        each_rows([&](int start, int rows) { shrink_group(kDown, active_.data(), intermediate, start, rows); });
        clock_.end(kRowsPhase);
        project_residual(layer.down, intermediate, lora[kDown], active_.data(), saved.lora_hidden[kDown].data(),
                         saved.middle.data(), out);
        clock_.end(kProductsPhase);
    }

    // out = in + x Wᵀ + (x Aᵀ) B, for the two modules that write to the residual stream.
    void project_residual(const bf16* w, int64_t width, const TrainGroup& lora, const bf16* x, const bf16* lora_hidden,
                          const float* in, float* out) {
        const int64_t hidden = sizes_.hidden;
        each_product(static_cast<int>(hidden / kTile), [&](int tile, int start, int rows) {
            float* y = room(scratch().y, kProductRows * kTile);
            product(w, width, hidden, lora, x, lora_hidden, tile * kTile, start, rows, y, kTile, scratch().product);
            for (int row = 0; row < rows; row++)
                for (int i = 0; i < kTile; i += 16) {
                    const int64_t at = (start + row) * hidden + tile * kTile + i;
                    store(out + at, load(in + at) + load(y + row * kTile + i));
                }
        });
    }

    // The backward pass.

    // A group's product y = x Wᵀ + (x Aᵀ) B with x (tokens, in), the gradient dy (tokens, out), and the sum of W's
    // gradient, or null. `kept` is the group's mask, or null.
    struct Product {
        const TrainGroup& lora;
        const uint16_t* kept;
        const bf16* x;
        int64_t in;
        const bf16* dy;
        int64_t out;
        float* d_w;
    };

    // Computes the gradient of a layer's input from its output's, both in d_residual_, and rounded in dy_.
    void backward_layer(int index) {
        const TrainLayer& layer = layers_[index];
        const TrainGroup* lora = batch_.lora + index * kGroups;
        const Saved& saved = this->saved(index);
        const int64_t hidden = sizes_.hidden, intermediate = sizes_.intermediate;
        const bool is_last = index == 0 && !trains_base();  // embeddings are frozen
        auto d_tensor = [&](LayerTensor tensor) { return d_weight(1 + index * kLayerTensors + tensor); };

        const Product down{lora[kDown], kept(index, kDown),   active_.data(), intermediate, dy_.data(),
                           hidden,      d_tensor(kDownTensor)};
        each_input_tile(
            down, num_b_items(down), [&](int i) { b_gradient(down, i); },
            [&](int tile, int start, int rows) {
                float* y = room(scratch().y, kProductRows * kTile);
                input_gradient(layer.down, down, tile, start, rows, y, kTile);
                for (int row = 0; row < rows; row++) {
                    const int64_t gate = (start + row) * 2 * intermediate + tile * kTile, up = gate + intermediate;
                    swiglu_backward(&saved.gate_up[gate], &saved.gate_up[up], y + row * kTile, kTile, &d_gate_up_[gate],
                                    &d_gate_up_[up], &active_[(start + row) * intermediate + tile * kTile]);
                }
            });
        if (down.kept != nullptr)
            each_rows([&](int start, int rows) { drop(down.kept, active_.data(), intermediate, start, rows); });
        begin_w(down);
        team_.each(num_a_and_w_items(down), [&](int i) { a_or_w_gradient(down, i); });
        clock_.end(kProductsBackwardPhase);

        const Product gate_up{lora[kGateUp],    kept(index, kGateUp),   x_.data(), hidden, d_gate_up_.data(),
                              2 * intermediate, d_tensor(kGateUpTensor)};
        each_rows([&](int start, int rows) {
            repeat_norm(saved.middle, saved.middle_rms, layer.post_norm, start, rows);
            drop(gate_up.kept, x_.data(), hidden, start, rows);
            outputs_backward(gate_up, saved.lora_hidden[kGateUp], start, rows);
        });
        clock_.end(kRowsBackwardPhase);
        each_gradient(gate_up, [&](int tile, int start, int rows) {
            input_gradient(layer.gate_up, gate_up, tile, start, rows, &dx_[start * hidden + tile * kTile], hidden);
        });
        clock_.end(kProductsBackwardPhase);

        const Product o{lora[kO],   kept(index, kO), saved.attn_out.data(), q_size_,
                        dy_.data(), hidden,          d_tensor(kOTensor)};
        norm_weight_backward(saved.middle, saved.middle_rms, d_tensor(kPostNormTensor));
        each_rows([&](int start, int rows) {
            norm_backward(saved.middle, saved.middle_rms, layer.post_norm, start, rows);
            drop(o.kept, o.x, q_size_, start, rows);
            outputs_backward(o, saved.lora_hidden[kO], start, rows);
        });
        clock_.end(kRowsBackwardPhase);
        each_gradient(o, [&](int tile, int start, int rows) {
            float* y = room(scratch().y, kProductRows * kTile);
            input_gradient(layer.o, o, tile, start, rows, y, kTile);
            for (int row = 0; row < rows; row++)
                round_to_bf16(y + row * kTile, kTile, &d_attn_out_[(start + row) * q_size_ + tile * kTile]);
        });
        clock_.end(kProductsBackwardPhase);
        each_head([&](int64_t text, int head) {
            const int64_t start = batch_.starts[text], at = (head * num_tokens_ + start) * head_dim_;
            const Text view = text_of(saved, text, head);
            float* dq = room(scratch().dq, view.length * head_dim_);
            attend_text_backward(view, &d_attn_out_[start * q_size_ + head * head_dim_], q_size_, dq, &dk_[at],
                                 &dv_[at], head_dim_, scratch().text);
            for (int row = 0; row < view.length; row++)
                put_head_gradient(layer, dq + row * head_dim_, true, start + row,
                                  &d_qkv_[(start + row) * qkv_size_ + head * head_dim_]);
        });
        clock_.end(kSelfAttentionBackwardPhase);

        const Product qkv{lora[kQkv],    kept(index, kQkv), x_.data(),           hidden,
                          d_qkv_.data(), qkv_size_,         d_tensor(kQkvTensor)};
        each_rows([&](int start, int rows) {
            sum_kv_gradients(layer, start, rows);
            repeat_norm(saved.in, saved.in_rms, layer.input_norm, start, rows);
            drop(qkv.kept, x_.data(), hidden, start, rows);
            outputs_backward(qkv, saved.lora_hidden[kQkv], start, rows);
        });
        clock_.end(kRowsBackwardPhase);
        each_gradient(qkv, [&](int tile, int start, int rows) {
            if (is_last) return;
            input_gradient(layer.qkv, qkv, tile, start, rows, &dx_[start * hidden + tile * kTile], hidden);
        });
        if (is_last) return;
        clock_.end(kProductsBackwardPhase);
        norm_weight_backward(saved.in, saved.in_rms, d_tensor(kInputNormTensor));
        each_rows([&](int start, int rows) {
            norm_backward(saved.in, saved.in_rms, layer.input_norm, start, rows);
            if (index > 0) down_outputs_backward(index - 1, start, rows);
        });
        clock_.end(kRowsBackwardPhase);
    }

    // `outputs_backward` of a layer's down projection, whose dy is complete before the layer's backward pass begins.
    void down_outputs_backward(int index, int start, int rows) {
        const TrainGroup& lora = batch_.lora[index * kGroups + kDown];
        outputs_backward({lora, nullptr, nullptr, sizes_.intermediate, dy_.data(), sizes_.hidden, nullptr},
                         saved(index).lora_hidden[kDown], start, rows);
    }

    // d_lora_hidden_ = dy Bᵀ. Transposes it, x Aᵀ (`lora_hidden`) and, if W is trained, dy for the products over
    // tokens.
    void outputs_backward(const Product& product, const Aligned<bf16>& lora_hidden, int start, int rows) {
        const int64_t lora_rows = product.lora.rows, first = start * lora_rows;
        const int out = static_cast<int>(product.out), columns = static_cast<int>(lora_rows);
        if (lora_rows > 0) {
            shrink_backward(product.lora, product.dy, product.out, start, rows, d_lora_hidden_.data(),
                            scratch().product);
            transpose(&d_lora_hidden_[first], lora_rows, rows, columns, &d_lora_hidden_T_[start], token_stride_);
            transpose(&lora_hidden[first], lora_rows, rows, columns, &lora_hidden_T_[start], token_stride_);
        }
        if (trains_base())
            transpose(product.dy + start * product.out, product.out, rows, out, &dy_T_[start], token_stride_);
    }

    // y (rows, 32): a tile of x's gradient, from d_lora_hidden_ and dy.
    void input_gradient(const bf16* w, const Product& product, int tile, int start, int rows, float* y,
                        int64_t y_stride) {
        product_backward(w, product.in, product.out, product.lora, product.kept, batch_.factor, product.dy,
                         d_lora_hidden_.data(), tile * kTile, start, rows, y, y_stride, scratch().product);
    }

    // Calls item(tile, first row, rows) for x's gradient, and computes the gradients of B, A and W meanwhile.
    template <class Item>
    void each_gradient(const Product& product, Item item) {
        const int b_items = num_b_items(product);
        auto other = [&](int i) { i < b_items ? b_gradient(product, i) : a_or_w_gradient(product, i - b_items); };
        each_input_tile(product, b_items + num_a_and_w_items(product), other, item);
    }

    // Calls item(tile, first row, rows) for x's gradient, and other(i) for i below `others`. Adapters' items are small:
    // they are spread evenly among the tiles, so that each thread has neighbouring tiles of W and fetches the next one
    // while it multiplies. If W is trained, the others come last.
    template <class Other, class Item>
    void each_input_tile(const Product& product, int others, Other other, Item item) {
        const int64_t tiles = product.in / kTile, products = tiles * product_chunks_, count = products + others;
        scratch().product.wide.begin(tiles / sizes_.threads);
        begin_w(product);
        auto products_before = [&](int64_t i) {
            return product.d_w == nullptr ? (i * products + count - 1) / count : std::min(i, products);
        };
        team_.each(static_cast<int>(count), [&](int i) {
            const int before = static_cast<int>(products_before(i));
            if (products_before(i + 1) > before)
                product_item(before, item);
            else
                other(i - before);
        });
    }

    static int num_b_items(const Product& product) {
        return product.lora.rows > 0 ? static_cast<int>(product.out / kTile) : 0;
    }
    void b_gradient(const Product& product, int item) {
        const int64_t column = static_cast<int64_t>(item) * kTile;
        const TrainModule* module = module_at(product.lora, column);
        if (module == nullptr) return;
        const int rank = static_cast<int>(module->rank);
        float* y = room(scratch().y, kTile * rank);
        multiply_over_tokens_turned(&lora_hidden_T_[module->row * token_stride_], token_stride_, rank, product.dy,
                                    product.out, column, num_tokens_, y, rank, scratch().product);
        add_scaled(y, rank, kTile, module->trained, 1,
                   batch_.gradients + module->b_start + (column - module->out_start) * module->trained,
                   module->trained);
    }

    static int num_a_items(const Product& product) {
        return product.lora.rows > 0 ? static_cast<int>(product.in / kTile) : 0;
    }
    void a_gradient(const Product& product, int64_t column) {
        const TrainGroup& lora = product.lora;
        const bf16* x = product.kept != nullptr ? lora_input_.data() : product.x;
        float* y = room(scratch().y, lora.rows * kTile);
        multiply_over_tokens({d_lora_hidden_T_.data(), static_cast<size_t>(token_stride_)}, static_cast<int>(lora.rows),
                             x, product.in, column, num_tokens_, y, kTile, scratch().product);
        for (int64_t i = 0; i < lora.num_modules; i++) {
            const TrainModule& module = lora.modules[i];
            for (int64_t repeat = 0; repeat < module.repeats; repeat++)
                add_scaled(y + (module.row + repeat * module.trained) * kTile, kTile, module.trained, kTile,
                           static_cast<float>(module.scaling), batch_.gradients + module.a_start + column, product.in);
        }
    }

    // Begins a phase that may have items of W.
    void begin_w(const Product& product) {
        if (product.d_w != nullptr) scratch().product.wide_turned.begin(product.in / kTile / sizes_.threads);
    }
    static int num_w_strips(const Product& product) {
        return static_cast<int>((product.out + kProductRows - 1) / kProductRows);
    }
    static int num_a_and_w_items(const Product& product) {
        const int tiles = static_cast<int>(product.in / kTile);
        return num_a_items(product) + (product.d_w != nullptr ? tiles * num_w_strips(product) : 0);
    }
    void a_or_w_gradient(const Product& product, int item) {
        if (item < num_a_items(product)) return a_gradient(product, static_cast<int64_t>(item) * kTile);
        item -= num_a_items(product);
        const int strips = num_w_strips(product), row = item % strips * kProductRows;
        const int64_t column = static_cast<int64_t>(item / strips) * kTile;
        const int rows = static_cast<int>(std::min<int64_t>(kProductRows, product.out - row));
        ProductScratch& own = scratch().product;
        multiply_over_tokens<true>(own.wide_turned.rows(dy_T_.data(), token_stride_, row, rows), rows, product.x,
                                   product.in, column, num_tokens_, product.d_w + row * product.in + column, product.in,
                                   own);
    }

    // x_ = the norm's output in the forward pass.
    void repeat_norm(const Aligned<float>& x, const Aligned<float>& inverse_rms, const bf16* weight, int start,
                     int rows) {
        const int64_t hidden = sizes_.hidden;
        for (int row = start; row < start + rows; row++)
            scale_by_weight(&x[row * hidden], inverse_rms[row], weight, hidden, &x_[row * hidden]);
    }

    // d_residual_ += the gradient of the norm's x, given that of its output, dx_. dy_ is d_residual_ in bf16.
    void norm_backward(const Aligned<float>& x, const Aligned<float>& inverse_rms, const bf16* weight, int start,
                       int rows) {
        for (int row = start; row < start + rows; row++) {
            const int64_t at = row * sizes_.hidden;
            rms_norm_backward(&x[at], inverse_rms[row], weight, sizes_.hidden, &dx_[at], &d_residual_[at]);
            round_to_bf16(&d_residual_[at], sizes_.hidden, &dy_[at]);
        }
    }

    // d_weight += the gradient of the norm's weight, given that of its output, dx_.
    void norm_weight_backward(const Aligned<float>& x, const Aligned<float>& inverse_rms, float* d_weight) {
        if (d_weight == nullptr) return;
        team_.each(static_cast<int>(sizes_.hidden / kTile), [&](int tile) {
            add_norm_gradient(x.data(), inverse_rms.data(), dx_.data(), num_tokens_, sizes_.hidden, tile * kTile,
                              d_weight);
        });
    }

    // Writes the gradients of keys and values to d_qkv_: the sums of dk_ and dv_ over the query heads of a kv head.
    void sum_kv_gradients(const TrainLayer& layer, int start, int rows) {
        const int64_t group = sizes_.heads / sizes_.kv_heads, head_stride = num_tokens_ * sizes_.head_dim;
        float* sum = room(scratch().y, head_dim_);
        for (int64_t head = 0; head < sizes_.kv_heads; head++)
            for (int row = start; row < start + rows; row++) {
                const int64_t from = head * group * head_stride + row * head_dim_;
                bf16* d_key = &d_qkv_[row * qkv_size_ + q_size_ + head * head_dim_];
                sum_rows(&dk_[from], head_stride, head_dim_, group, sum);
                put_head_gradient(layer, sum, true, row, d_key);
                sum_rows(&dv_[from], head_stride, head_dim_, group, sum);
                put_head_gradient(layer, sum, false, row, d_key + kv_size_);
            }
    }

    // Undoes the rotation of a head's gradient, and rounds it into `rounded`, its place in d_qkv_.
    void put_head_gradient(const TrainLayer& layer, float* gradient, bool is_rotated, int64_t token, bf16* rounded) {
        if (is_rotated && layer.uses_rotary) rotate_head(gradient, token, true);
        round_to_bf16(gradient, head_dim_, rounded);
    }

    const BaseSizes sizes_;
    const int head_dim_;
    const int64_t q_size_, kv_size_, qkv_size_;  // features of queries, of keys or values, and of all three
    const int64_t inputs_[kGroups];              // features of a group's input
    const float* rotary_;                        // (2, max_positions, head_dim), as `rotary_table` makes it
    Team team_;
    TrainClock clock_;
    std::vector<TrainLayer> layers_;
    const bf16 *embed_, *final_norm_;
    Loss loss_;

    TrainBatch batch_{};
    bool may_go_backward_ = false;  // whether `batch_` has had a forward, but no backward pass
    int num_tokens_ = 0, product_chunks_ = 0, row_chunks_ = 0;
    int token_stride_ = 0;  // num_tokens_, rounded up to a multiple of 32
    std::vector<int> positions_;
    std::vector<Saved> saved_;
    Aligned<float> last_, last_rms_;  // the residual stream after the last layer; see `Saved`
    Aligned<bf16> x_, active_;        // the last outputs of a norm and of the activation
    Aligned<bf16> lora_input_;        // A's input after dropout, if there is any
    Aligned<float> d_residual_, dx_;  // the gradients of the residual stream and of a norm's output
    Aligned<bf16> dy_, d_attn_out_, d_qkv_, d_gate_up_;
    Aligned<float> dk_, dv_;  // (heads, tokens, dim): for each query head
    // Of the current group: dy Bᵀ (tokens, rows of A), and x Aᵀ and dy Bᵀ as (rows of A, tokens).
    Aligned<bf16> d_lora_hidden_, lora_hidden_T_, d_lora_hidden_T_;
    Aligned<bf16> dy_T_;  // if the base is trained: the current product's dy as (out, tokens)
    std::vector<TrainScratch> scratch_;
};

Training& training_of(void* training) { return *static_cast<Training*>(training); }

}  // namespace

int smolora_training_create(const BaseSizes* sizes, const BaseTensor* tensors, const float* rotary,
                            const uint8_t* uses_rotary, void** training, char* error) {
    return guarded(error, [&] {
        check_sizes(*sizes);
        *training = new Training(*sizes, tensors, rotary, uses_rotary);
    });
}

void smolora_training_destroy(void* training) { delete static_cast<Training*>(training); }

int smolora_training_forward(void* training, const TrainBatch* batch, bf16* hidden, char* error) {
    return guarded(error, [&] { training_of(training).forward(*batch, hidden); });
}

int smolora_training_loss(void* training, const bf16* hidden, const int64_t* targets, int64_t rows, double factor,
                          bf16* d_hidden, float* d_head, double* loss, char* error) {
    return guarded(error, [&] { *loss = training_of(training).loss(hidden, targets, rows, factor, d_hidden, d_head); });
}

int smolora_training_measure(void* training, const bf16* hidden, const int64_t* targets, int64_t rows, double* losses,
                             int64_t* likeliest, char* error) {
    return guarded(error, [&] { training_of(training).measure(hidden, targets, rows, losses, likeliest); });
}

int smolora_training_backward(void* training, const bf16* d_hidden, char* error) {
    return guarded(error, [&] { training_of(training).backward(d_hidden); });
}

int smolora_training_phases(void* training, int64_t is_on, int64_t* nanoseconds, char* error) {
    return guarded(error, [&] {
        const auto spent = training_of(training).clock().take(is_on != 0);
        std::copy(spent.begin(), spent.end(), nanoseconds);
    });
}
