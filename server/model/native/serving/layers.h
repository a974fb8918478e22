// The layers of a step's forward pass, from token ids to the residual stream behind the last one.
//
// The same arithmetic as server/model/smollm.py: weights and what they multiply are bf16, sums and the residual stream
// are fp32. Adapters are added beside the base's weights.
#pragma once
#include "base.h"
#include "kernels/layers.h"
#include "kernels/lora/group.h"
#include "kernels/phases.h"
#include "step_attention.h"
#include "tokens.h"

namespace {

constexpr int kChunk = 96;      // rows that an item takes of a product: blocks of 12 and of 32
constexpr int kQueryRows = 48;  // rows, a head each, that an item takes of attention

struct alignas(64) LayerScratch {  // of one thread
    std::vector<float> y;
    ExpandedTile tiles[2];
    WideRows wide;          // of the phase's x
    PrefetchList prefetch;  // empty between products
};

class Layers {
  public:
    // `rotary` (2, max_positions, head_dim), as `rotary_table` makes it. All are kept.
    Layers(const BaseSizes& sizes, const float* rotary, const ServeBase& base, Team& team,
           PhaseClock<Phase, kPhases>& clock)
        : s_(sizes),
          rotary_(rotary),
          base_(base),
          team_(team),
          clock_(clock),
          attention_((int)sizes.heads, team.size()),
          scratch_(sizes.threads) {}

    // Everything that the phases share, sized for this step.
    void prepare(const ServeStep& step) {
        const int64_t count = step.num_tokens;
        tokens_.plan(step, std::max(kQueryRows / (int)(s_.heads / s_.kv_heads), 1));
        set_chunks();
        residual_.resize(count * s_.hidden);
        x_.resize(count * s_.hidden);
        q_.resize(count * s_.heads * s_.head_dim);
        attn_out_.resize(count * s_.heads * s_.head_dim);
        active_.resize(count * s_.intermediate);
        lora_.plan(step);
    }

    int num_wanted() const { return tokens_.num_wanted(); }

    // All tokens' keys and values go into the cache. Of the last layer only the tokens whose final hidden states are
    // wanted compute more than that. `end` follows the last layer in the team's job, if any token is wanted.
    template <class End>
    void run(const ServeStep& step, End end) {
        const int64_t size = step.block_size * s_.kv_heads * s_.head_dim;  // of a layer's part of a block
        const int last = (int)s_.layers - 1;
        auto cache = [&](int layer) {
            return CacheView{step.k + layer * size, step.v + layer * size, (int)step.block_size,
                             (int)s_.kv_heads,      (int)s_.head_dim,      (size_t)(s_.layers * size)};
        };
        auto begin = [&] {
            embed(step);
            clock_.end(kEmbedPhase);
            for (int i = 0; i < last; i++) {
                begin_layer(i, cache(i));
                finish_layer(i, cache(i));
            }
            begin_layer(last, cache(last));
        };
        auto finish = [&] {
            finish_layer(last, cache(last));
            end();
        };
        attention_.plan(tokens_.queries(), cache(0), team_.active());
        if (tokens_.num_wanted() == tokens_.count()) {
            team_.run([&] { begin(), finish(); });
        } else {
            team_.run(begin);
            if (tokens_.num_wanted() == 0) return clock_.end(kQkvPhase);
            keep_wanted(step);
            attention_.plan(tokens_.queries(), cache(last), team_.active());
            team_.run(finish);
        }
    }

    // y (wanted, hidden): the final hidden states, for the end of `run`.
    void final_norm(bf16* y) { norm(base_.final_norm, y); }

  private:
    void set_chunks() { chunks_ = (tokens_.count() + kChunk - 1) / kChunk; }

    // What the last layer's queries, the residual stream and the adapters are from here on: of the wanted tokens alone.
    void keep_wanted(const ServeStep& step) {
        const int64_t q = s_.heads * s_.head_dim;
        tokens_.keep_wanted(step, [&](int64_t from, int64_t to, int64_t count) {
            std::copy_n(&residual_[from * s_.hidden], count * s_.hidden, &residual_[to * s_.hidden]);
            std::copy_n(&q_[from * q], count * q, &q_[to * q]);
        });
        set_chunks();
        lora_.keep_wanted(step);
    }

    // Queries, and keys and values, which go into the cache.
    void begin_layer(int layer, const CacheView& cache) {
        norm(base_.layers[layer].input_norm, x_.data());
        clock_.end(kNormPhase);
        project_qkv_to_cache(layer, cache);
    }

    // Everything behind them.
    void finish_layer(int layer, const CacheView& cache) {
        clock_.end(kQkvPhase);
        attention_.run(team_, cache, q_.data(), attn_out_.data());
        clock_.end(kAttentionPhase);
        project_residual(layer, base_.layers[layer].o, kO, attn_out_.data());
        clock_.end(kOPhase);
        norm(base_.layers[layer].post_norm, x_.data());
        clock_.end(kNormPhase);
        activate(layer);
        clock_.end(kGateUpPhase);
        project_residual(layer, base_.layers[layer].down, kDown, active_.data());
        clock_.end(kDownPhase);
    }

    void embed(const ServeStep& step) {
        team_.each(tokens_.count(), [&](int t) {
            const bf16* row = base_.embed + step.token_ids[t] * s_.hidden;
            for (int64_t i = 0; i < s_.hidden; i += 16)
                _mm512_storeu_ps(&residual_[t * s_.hidden + i], load_bf16(row + i));
        });
    }

    // y = the stream's rows, divided by their root mean square and times `weight`.
    void norm(const bf16* weight, bf16* y) {
        constexpr int kAtOnce = 8;
        team_.each((tokens_.count() + kAtOnce - 1) / kAtOnce, [&](int item) {
            for (int row = item * kAtOnce; row < std::min(tokens_.count(), (item + 1) * kAtOnce); row++)
                rms_norm(&residual_[row * s_.hidden], weight, s_.hidden, s_.eps, y + row * s_.hidden);
        });
    }

    // Calls item(column item, first row, rows) for a product with x of a group, whose shares of A come first.
    template <class Item>
    void product(int layer, Group group, const bf16* x, int columns, Item item) {
        LoraGroup& lora = lora_[group];
        scratch().wide.begin(columns / team_.active());
        team_.each(
            lora.num_tasks(), [&](int task) { lora.shrink(layer, task, x); }, columns * chunks_,
            [&](int i) {
                const int start = i % chunks_ * kChunk;
                item(i / chunks_, start, std::min(tokens_.count() - start, kChunk));
            });
    }

    // y (rows, 32): outputs [32 · tile, …) of the product for x's rows from `start` on, with the adapters' share. An
    // item's tiles that were expanded are kept for its next rows: `slot` tells them apart. Meanwhile what adapters need
    // next is prefetched.
    void forward_tile(int layer, const Matrix& w, Group group, const bf16* x, int tile, int start, int rows, float* y,
                      int y_stride, int slot) {
        const size_t in = (size_t)w.in();
        const LoraGroup& lora = lora_[group];
        LayerScratch& own = scratch();
        lora_.add_to(own.prefetch, layer, group, start, rows, tile * kTile, tile * chunks_ + start / kChunk,
                     w.num_tiles() * chunks_);
        w.multiply(own.wide.rows(x, in, start, rows), rows, tile, y, y_stride, own.tiles[chunks_ > 1 ? slot : 0],
                   own.prefetch);
        if (lora.num_tasks() == 0) return;
        team_.wait_first(lora.num_tasks());
        lora.expand(layer, start, rows, tile * kTile, y, y_stride);
    }

    // Queries, keys and values of x, rotated, into q and the cache: an item is a head.
    void project_qkv_to_cache(int layer, const CacheView& cache) {
        const int dim = (int)s_.head_dim, heads = (int)s_.heads, kv_heads = (int)s_.kv_heads;
        product(layer, kQkv, x_.data(), heads + 2 * kv_heads, [&](int head, int start, int rows) {
            float* y = room(scratch().y, kChunk * dim);
            for (int tile = 0; tile < dim / kTile; tile++)
                forward_tile(layer, base_.layers[layer].qkv, kQkv, x_.data(), head * dim / kTile + tile, start, rows,
                             y + tile * kTile, dim, tile % 2);
            for (int row = 0; row < rows; row++) {
                const int t = start + row;
                float* values = y + row * dim;
                if (head < heads + kv_heads && base_.layers[layer].uses_rotary)
                    rotate(values, rotary_, s_.max_positions, dim, tokens_.position(t), false);
                const int32_t* blocks = tokens_.blocks(t);
                if (head >= heads + kv_heads)
                    cache.put_value(blocks, tokens_.position(t), head - heads - kv_heads, values);
                else if (head >= heads)
                    cache.put_key(blocks, tokens_.position(t), head - heads, values);
                else
                    for (int i = 0; i < dim; i += 16)
                        store_bf16(&q_[((int64_t)t * heads + head) * dim + i], _mm512_loadu_ps(values + i));
            }
        });
    }

    // stream += W x, for the two modules that write to it.
    void project_residual(int layer, const Matrix& w, Group group, const bf16* x) {
        product(layer, group, x, (int)(s_.hidden / kTile), [&](int tile, int start, int rows) {
            float y[kChunk * kTile];
            forward_tile(layer, w, group, x, tile, start, rows, y, kTile, 0);
            for (int row = 0; row < rows; row++) {
                float* to = &residual_[(start + row) * s_.hidden + tile * kTile];
                for (int i = 0; i < kTile; i += 16)
                    _mm512_storeu_ps(to + i,
                                     _mm512_add_ps(_mm512_loadu_ps(to + i), _mm512_loadu_ps(y + row * kTile + i)));
            }
        });
    }

    // active = silu(gate x) · up x
    void activate(int layer) {
        const int tiles = (int)(s_.intermediate / kTile);
        product(layer, kGateUp, x_.data(), tiles, [&](int tile, int start, int rows) {
            float gate[kChunk * kTile], up[kChunk * kTile];
            const Matrix& w = base_.layers[layer].gate_up;
            forward_tile(layer, w, kGateUp, x_.data(), tile, start, rows, gate, kTile, 0);
            forward_tile(layer, w, kGateUp, x_.data(), tiles + tile, start, rows, up, kTile, 1);
            for (int row = 0; row < rows; row++)
                for (int i = 0; i < kTile; i += 16) {
                    __m512 g = _mm512_loadu_ps(gate + row * kTile + i), u = _mm512_loadu_ps(up + row * kTile + i);
                    store_bf16(&active_[(start + row) * s_.intermediate + tile * kTile + i], _mm512_mul_ps(silu(g), u));
                }
        });
    }

    LayerScratch& scratch() { return scratch_[Team::number()]; }

    const BaseSizes& s_;
    const float* rotary_;
    const ServeBase& base_;
    Team& team_;
    PhaseClock<Phase, kPhases>& clock_;

    StepTokens tokens_;
    int chunks_ = 0;
    std::vector<float> residual_;
    std::vector<bf16> x_, q_, attn_out_, active_;
    StepAttention attention_;
    LoraGroups lora_;
    std::vector<LayerScratch> scratch_;
};

}  // namespace
