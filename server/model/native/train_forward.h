// The forward pass of a training batch, which keeps what the backward pass reads where there is to be one.
#pragma once

#include "train_pass.h"

namespace {

class TrainForward : protected TrainPass {
  public:
    using TrainPass::TrainPass;

    // hidden (tokens, hidden): the final hidden states.
    void forward(const TrainBatch& batch, bf16* hidden) {
        has_passed_ = false;
        clock_.begin();
        check_batch(s_, batch);
        batch_ = batch;
        prepare(batch);
        team_.run([&] {
            each_rows([&](int start, int rows) {
                for (int t = start; t < start + rows; t++)
                    for (int64_t i = 0; i < s_.hidden; i += 16)
                        _mm512_storeu_ps(&saved(0).in[t * s_.hidden + i],
                                         load_bf16(embed_ + batch.token_ids[t] * s_.hidden + i));
            });
            for (int i = 0; i < s_.layers; i++)
                forward(i, batch, i + 1 < s_.layers ? saved(i + 1).in.data() : last_.data());
            each_rows(
                [&](int start, int rows) { norm(last_.data(), final_norm_, start, rows, hidden, last_rms_.data()); });
        });
        clock_.end(kRowsPhase);
        has_passed_ = batch.has_backward != 0;
    }

  private:
    void forward(int index, const TrainBatch& batch, float* out) {
        const TrainLayer& layer = layers_[index];
        const TrainGroup* lora = batch.lora + index * kGroups;
        Saved& saved = this->saved(index);
        const int dim = (int)s_.head_dim, tiles = (int)(s_.intermediate / kTile);
        auto lora_hidden = [&](Group group, const bf16* x, int64_t in, int start, int rows) {
            x = met(lora[group], batch, x, in, start, rows);
            shrink(lora[group], x, in, start, rows, saved.hidden[group].data(), scratch().product);
        };

        each_rows([&](int start, int rows) {
            norm(saved.in.data(), layer.input_norm, start, rows, x_.data(), saved.in_rms.data());
            lora_hidden(kQkv, x_.data(), s_.hidden, start, rows);
        });
        clock_.end(kRowsPhase);
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
        clock_.end(kProductsPhase);
        team_.each((int)(batch.num_texts * s_.heads), [&](int i) {
            const int head = (int)(i % s_.heads);
            const int64_t text = i / s_.heads;
            attend_text(view(saved, batch, text, head), &saved.attn_out[batch.starts[text] * q_ + head * dim], q_,
                        scratch().text);
        });
        clock_.end(kSelfAttentionPhase);
        each_rows([&](int start, int rows) { lora_hidden(kO, saved.attn_out.data(), q_, start, rows); });
        clock_.end(kRowsPhase);
        project_residual(layer.o, q_, lora[kO], saved.attn_out.data(), saved.hidden[kO].data(), saved.in.data(),
                         saved.middle.data());
        clock_.end(kProductsPhase);

        each_rows([&](int start, int rows) {
            norm(saved.middle.data(), layer.post_norm, start, rows, x_.data(), saved.middle_rms.data());
            lora_hidden(kGateUp, x_.data(), s_.hidden, start, rows);
        });
        clock_.end(kRowsPhase);
        each_product(tiles, [&](int tile, int start, int rows) {
            float *gate = room(scratch().y, 2 * kProductRows * kTile), *up = gate + kProductRows * kTile;
            for (bool is_up : {false, true})
                product(layer.gate_up, s_.hidden, 2 * s_.intermediate, lora[kGateUp], x_.data(),
                        saved.hidden[kGateUp].data(), (is_up ? tiles + tile : tile) * kTile, start, rows,
                        is_up ? up : gate, kTile, scratch().product);
            for (int row = 0; row < rows; row++) {
                bf16* to = &saved.gate_up[(start + row) * 2 * s_.intermediate + tile * kTile];
                round_to_bf16(gate + row * kTile, kTile, to);
                round_to_bf16(up + row * kTile, kTile, to + s_.intermediate);
                swiglu(to, to + s_.intermediate, kTile, &active_[(start + row) * s_.intermediate + tile * kTile]);
            }
        });
        clock_.end(kProductsPhase);
        each_rows([&](int start, int rows) { lora_hidden(kDown, active_.data(), s_.intermediate, start, rows); });
        clock_.end(kRowsPhase);
        project_residual(layer.down, s_.intermediate, lora[kDown], active_.data(), saved.hidden[kDown].data(),
                         saved.middle.data(), out);
        clock_.end(kProductsPhase);
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
};

}  // namespace
