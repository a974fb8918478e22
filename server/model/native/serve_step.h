// The SmolLM forward, from token ids to final hidden states and from those to logits or the next tokens, for CPUs with
// AVX-512 and its bf16 products.
//
// The same arithmetic as server/model/smollm.py: weights and what they multiply are bf16, sums and the residual stream
// are fp32. The base's weights are packed once and never written; adapters are added beside them.
#pragma once
#include "kernels/attention.h"
#include "kernels/layers.h"
#include "kernels/lora/group.h"
#include "kernels/matrix.h"
#include "kernels/phases.h"
#include "kernels/sampling.h"
#include "kernels/team.h"
#include "seam/checks.h"

namespace {

constexpr int kChunk = 96;      // rows that an item takes of a product: blocks of 12 and of 32
constexpr int kQueryRows = 48;  // rows, a head each, that an item takes of attention

struct ServeLayer {
    const bf16 *input_norm, *post_norm;
    Matrix qkv, o, gate_up, down;
    bool uses_rotary;
};

struct alignas(64) ServeScratch {  // of one thread
    AttentionScratch attention;
    std::vector<float> y;
    std::vector<bf16> q;
    ExpandedTile tiles[2];
    PrefetchList prefetch;  // empty between products
    RowSampler sampler;
};

class Model {
  public:
    Model(const BaseSizes& sizes, const BaseTensor* tensors, const float* rotary, const uint8_t* uses_rotary)
        : s_(sizes), rotary_(rotary), team_((int)sizes.threads), layers_(sizes.layers), scratch_(sizes.threads) {
        const int64_t q = s_.heads * s_.head_dim, kv = s_.kv_heads * s_.head_dim;
        embed_ = tensors++->values;
        for (int64_t i = 0; i < s_.layers; i++) {
            ServeLayer& layer = layers_[i];
            layer.uses_rotary = uses_rotary[i];
            layer.input_norm = tensors++->values;
            pack(layer.qkv, *tensors++, q + 2 * kv, s_.hidden);
            pack(layer.o, *tensors++, s_.hidden, q);
            layer.post_norm = tensors++->values;
            pack(layer.gate_up, *tensors++, 2 * s_.intermediate, s_.hidden);
            pack(layer.down, *tensors++, s_.hidden, s_.intermediate);
        }
        final_norm_ = tensors++->values;
        pack(lm_head_, *tensors++, s_.vocab, s_.hidden);
    }

    // Final hidden states of all tokens, whose keys and values go into the cache.
    void forward(const ServeStep& step) {
        clock_.begin();
        check_step(s_, step);
        prepare(step);
        const int64_t layer_size = step.num_blocks * step.block_size * s_.kv_heads * s_.head_dim;
        team_.run([&] {
            embed(step);
            clock_.end(kEmbedPhase);
            for (int i = 0; i < s_.layers; i++) {
                CacheView cache{step.k + i * layer_size, step.v + i * layer_size, (int)step.block_size,
                                (int)s_.kv_heads, (int)s_.head_dim};
                norm(layers_[i].input_norm, x_.data());
                clock_.end(kNormPhase);
                project_qkv_to_cache(i, cache, step);
                clock_.end(kQkvPhase);
                attend(cache);
                clock_.end(kAttentionPhase);
                project_residual(i, layers_[i].o, kO, attn_out_.data());
                clock_.end(kOPhase);
                norm(layers_[i].post_norm, x_.data());
                clock_.end(kNormPhase);
                activate(i);
                clock_.end(kGateUpPhase);
                project_residual(i, layers_[i].down, kDown, active_.data());
                clock_.end(kDownPhase);
            }
            norm(final_norm_, step.hidden);
        });
        clock_.end(kNormPhase);
    }

    // logits (rows, vocab) of hidden (rows, hidden).
    void project(const bf16* hidden, int64_t rows, float* logits) {
        if (rows < 0 || rows > kMaxTokens) refuse("%ld rows", rows);
        clock_.begin();
        team_.run([&] { head(hidden, (int)rows, logits); });
        clock_.end(kHeadPhase);
    }

    // The next token of each row of hidden states, or of logits.
    void sample(const SampleStep& step) {
        clock_.begin();
        check_sampling(s_, step);
        float* logits = step.logits ? step.logits : room(logits_, step.num_rows * s_.vocab);
        team_.run([&] {
            if (step.hidden) head(step.hidden, (int)step.num_rows, logits);
            clock_.end(kHeadPhase);
            team_.each((int)step.num_rows, [&](int row) {
                scratch().sampler.run(step, step.rows[row], logits + row * s_.vocab, s_.vocab, step.token_ids + row,
                                      step.logprobs + row * (1 + step.max_top), step.top_ids + row * step.max_top);
            });
        });
        clock_.end(kSamplingPhase);
    }

    PhaseClock<Phase, kPhases>& clock() { return clock_; }

  private:
    struct Query {  // tokens [start, stop) of the batch, of one sequence, from `position` on in it
        int start, stop, position;
        const int32_t* blocks;
    };

    void pack(Matrix& matrix, const BaseTensor& w, int64_t out, int64_t in) {
        if (w.type < kBf16 || w.type > kQ8_0 || (w.type != kBf16 && w.blocks == nullptr))
            refuse("weights of type %ld", w.type);
        matrix.reserve((WeightType)w.type, (int)out, (int)in);
        team_.run([&] { team_.each((int)(out / kTile), [&](int tile) { matrix.pack(w, tile); }); });
    }

    // Everything that the phases share, sized for this step.
    void prepare(const ServeStep& step) {
        tokens_ = (int)step.num_tokens;
        chunks_ = (tokens_ + kChunk - 1) / kChunk;
        residual_.resize(tokens_ * s_.hidden);
        x_.resize(tokens_ * s_.hidden);
        q_.resize(tokens_ * s_.heads * s_.head_dim);
        attn_out_.resize(tokens_ * s_.heads * s_.head_dim);
        active_.resize(tokens_ * s_.intermediate);
        positions_.resize(tokens_);
        run_of_.resize(tokens_);
        lora_.plan(step);
        queries_.clear();
        const int group = (int)(s_.heads / s_.kv_heads), block = std::max(kQueryRows / group, 1);
        for (int64_t i = 0; i < step.num_runs; i++) {
            const ServeRun& run = step.runs[i];
            const int32_t* blocks = step.blocks + run.first_block;
            for (int64_t t = run.start; t < run.stop; t++) {
                positions_[t] = (int)(run.position + t - run.start);
                run_of_[t] = (int)i;
            }
            for (int64_t t = run.start; t < run.stop; t += block)
                queries_.push_back({(int)t, (int)std::min(t + block, run.stop), positions_[t], blocks});
        }
    }

    void head(const bf16* hidden, int rows, float* logits) {
        team_.each((int)(s_.vocab / kTile), [&](int tile) {
            ServeScratch& own = scratch();
            lm_head_.multiply(hidden, s_.hidden, rows, tile, logits + tile * kTile, s_.vocab, own.tiles[0],
                              own.prefetch);
        });
    }

    void embed(const ServeStep& step) {
        team_.each(tokens_, [&](int t) {
            const bf16* row = embed_ + step.token_ids[t] * s_.hidden;
            for (int64_t i = 0; i < s_.hidden; i += 16)
                _mm512_storeu_ps(&residual_[t * s_.hidden + i], load_bf16(row + i));
        });
    }

    // y = the stream's rows, divided by their root mean square and times `weight`.
    void norm(const bf16* weight, bf16* y) {
        constexpr int kAtOnce = 8;
        team_.each((tokens_ + kAtOnce - 1) / kAtOnce, [&](int item) {
            for (int row = item * kAtOnce; row < std::min(tokens_, (item + 1) * kAtOnce); row++)
                rms_norm(&residual_[row * s_.hidden], weight, s_.hidden, s_.eps, y + row * s_.hidden);
        });
    }

    // Calls item(column item, first row, rows) for a product with x of a group, whose shares of A come first.
    template <class Item>
    void product(int layer, Group group, const bf16* x, int columns, Item item) {
        LoraGroup& lora = lora_[group];
        team_.each(
            lora.num_tasks(), [&](int task) { lora.shrink(layer, task, x); }, columns * chunks_,
            [&](int i) {
                const int start = i % chunks_ * kChunk;
                item(i / chunks_, start, std::min(tokens_ - start, kChunk));
            });
    }

    // y (rows, 32): outputs [32 · tile, …) of the product for x's rows from `start` on, with the adapters' share. An
    // item's tiles that were expanded are kept for its next rows: `slot` tells them apart. Meanwhile what adapters need
    // next is prefetched.
    void forward_tile(int layer, const Matrix& w, Group group, const bf16* x, int tile, int start, int rows, float* y,
                      int y_stride, int slot) {
        const size_t in = (size_t)w.in();
        const LoraGroup& lora = lora_[group];
        ServeScratch& own = scratch();
        lora_.add_to(own.prefetch, layer, group, start, rows, tile * kTile, tile * chunks_ + start / kChunk,
                     w.num_tiles() * chunks_);
        w.multiply(x + start * in, in, rows, tile, y, y_stride, own.tiles[chunks_ > 1 ? slot : 0], own.prefetch);
        if (lora.num_tasks() == 0) return;
        team_.wait_first(lora.num_tasks());
        lora.expand(layer, start, rows, tile * kTile, y, y_stride);
    }

    // Queries, keys and values of x, rotated, into q and the cache: an item is a head.
    void project_qkv_to_cache(int layer, const CacheView& cache, const ServeStep& step) {
        const int dim = (int)s_.head_dim, heads = (int)s_.heads, kv_heads = (int)s_.kv_heads;
        product(layer, kQkv, x_.data(), heads + 2 * kv_heads, [&](int head, int start, int rows) {
            float* y = room(scratch().y, kChunk * dim);
            for (int tile = 0; tile < dim / kTile; tile++)
                forward_tile(layer, layers_[layer].qkv, kQkv, x_.data(), head * dim / kTile + tile, start, rows,
                             y + tile * kTile, dim, tile % 2);
            for (int row = 0; row < rows; row++) {
                const int t = start + row;
                float* values = y + row * dim;
                if (head < heads + kv_heads && layers_[layer].uses_rotary)
                    rotate(values, rotary_, s_.max_positions, dim, positions_[t], false);
                const int32_t* blocks = step.blocks + step.runs[run_of_[t]].first_block;
                if (head >= heads + kv_heads)
                    cache.put_value(blocks, positions_[t], head - heads - kv_heads, values);
                else if (head >= heads)
                    cache.put_key(blocks, positions_[t], head - heads, values);
                else
                    for (int i = 0; i < dim; i += 16)
                        store_bf16(&q_[((int64_t)t * heads + head) * dim + i], _mm512_loadu_ps(values + i));
            }
        });
    }

    void attend(const CacheView& cache) {
        const int dim = cache.head_dim, heads = (int)s_.heads, kv_heads = cache.kv_heads, group = heads / kv_heads;
        team_.each((int)queries_.size() * kv_heads, [&](int i) {
            const Query& query = queries_[queries_.size() - 1 - i / kv_heads];  // the longest come last
            const int kv_head = i % kv_heads;
            const size_t first = ((size_t)query.start * heads + kv_head * group) * dim;
            const int rows = (query.stop - query.start) * group;
            bf16* q = room(scratch().q, (size_t)rows * dim);
            float* out = room(scratch().y, (size_t)rows * dim);
            for (int row = 0; row < rows; row++)
                memcpy(&q[row * dim], &q_[first + ((size_t)row / group * heads + row % group) * dim],
                       dim * sizeof(bf16));
            ::attend(q, rows, group, query.position, cache, query.blocks, kv_head, out, scratch().attention);
            for (int row = 0; row < rows; row++)
                for (int d = 0; d < dim; d += 16)
                    store_bf16(&attn_out_[first + ((size_t)row / group * heads + row % group) * dim + d],
                               _mm512_loadu_ps(out + row * dim + d));
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
            const Matrix& w = layers_[layer].gate_up;
            forward_tile(layer, w, kGateUp, x_.data(), tile, start, rows, gate, kTile, 0);
            forward_tile(layer, w, kGateUp, x_.data(), tiles + tile, start, rows, up, kTile, 1);
            for (int row = 0; row < rows; row++)
                for (int i = 0; i < kTile; i += 16) {
                    __m512 g = _mm512_loadu_ps(gate + row * kTile + i), u = _mm512_loadu_ps(up + row * kTile + i);
                    store_bf16(&active_[(start + row) * s_.intermediate + tile * kTile + i], _mm512_mul_ps(silu(g), u));
                }
        });
    }

    ServeScratch& scratch() { return scratch_[Team::number()]; }

    const BaseSizes s_;
    const float* rotary_;  // (2, max_positions, head_dim), as `rotary_table` makes it
    Team team_;
    std::vector<ServeLayer> layers_;
    const bf16 *embed_, *final_norm_;
    Matrix lm_head_;
    PhaseClock<Phase, kPhases> clock_;

    int tokens_ = 0, chunks_ = 0;
    std::vector<float> residual_, logits_;
    std::vector<bf16> x_, q_, attn_out_, active_;
    std::vector<int> positions_, run_of_;
    LoraGroups lora_;
    std::vector<Query> queries_;
    std::vector<ServeScratch> scratch_;
};

}  // namespace
