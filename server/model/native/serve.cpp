// Serving: a step's forward pass from token ids to final hidden states, then to logits or next tokens.
//
// It computes what server/model/smollm.py computes: weights and their operands are bf16; sums and the residual stream
// are fp32. A token's result doesn't depend on the other tokens of its step, nor on the number of threads.
#include <algorithm>
#include <vector>

#include "kernels/layers.h"
#include "kernels/lora/group.h"
#include "kernels/matrix.h"
#include "kernels/phases.h"
#include "kernels/sampling.h"
#include "kernels/step_attention.h"
#include "kernels/team.h"
#include "seam/checks.h"

namespace {

constexpr int kChunk = 96;      // rows in an item of a product; a multiple of the blocks of 12 and of 32 rows
constexpr int kQueryRows = 48;  // rows in an item of attention: its tokens times the query heads of a kv head
constexpr int kNormRows = 8;    // rows in an item of a norm

using StepClock = PhaseClock<Phase, kPhases>;

struct ServeLayer {
    const bf16 *input_norm, *post_norm;
    Matrix qkv, o, gate_up, down;
    bool uses_rotary;
};

// The base's weights, packed once and never written.
struct ServeBase {
    // `tensors` are smolora_create's. The team packs them.
    ServeBase(const BaseSizes& sizes, const BaseTensor* tensors, const uint8_t* uses_rotary, Team& team)
        : layers(sizes.layers) {
        const int64_t q = sizes.heads * sizes.head_dim, kv = sizes.kv_heads * sizes.head_dim;
        embed = tensors++->values;
        for (int64_t i = 0; i < sizes.layers; i++) {
            ServeLayer& layer = layers[i];
            layer.uses_rotary = uses_rotary[i];
            layer.input_norm = tensors++->values;
            pack(layer.qkv, *tensors++, q + 2 * kv, sizes.hidden, team);
            pack(layer.o, *tensors++, sizes.hidden, q, team);
            layer.post_norm = tensors++->values;
            pack(layer.gate_up, *tensors++, 2 * sizes.intermediate, sizes.hidden, team);
            pack(layer.down, *tensors++, sizes.hidden, sizes.intermediate, team);
        }
        final_norm = tensors++->values;
        pack(lm_head, *tensors++, sizes.vocab, sizes.hidden, team);
    }

    std::vector<ServeLayer> layers;
    const bf16 *embed, *final_norm;
    Matrix lm_head;

  private:
    // With AVX2, one or two threads expand stored weights more slowly than they read 16-bit ones from memory.
    static bool keeps_stored(const Team& team) { return simd::kSums >= 24 || team.size() > 2; }

    static void pack(Matrix& matrix, const BaseTensor& tensor, int64_t out, int64_t in, Team& team) {
        if (tensor.type < kBf16 || tensor.type > kQ8_0 || (tensor.type != kBf16 && tensor.blocks == nullptr))
            refuse("weights of type %ld", tensor.type);
        const WeightType type = keeps_stored(team) ? static_cast<WeightType>(tensor.type) : kBf16;
        matrix.reserve(type, static_cast<int>(out), static_cast<int>(in));
        const int tiles = static_cast<int>(out / kTile);
        team.run([&] { team.each(tiles, [&](int tile) { matrix.pack(tensor, tile); }); });
    }
};

// The tokens of a step: their positions, their block tables, and the queries that attend together.
class StepTokens {
  public:
    // Plans all of a step's tokens. A query has at most `max_query` tokens.
    void plan(const ServeStep& step, int max_query) {
        max_query_ = max_query;
        count_ = static_cast<int>(step.num_tokens);
        num_wanted_ = 0;
        positions_.resize(count_);
        block_tables_.resize(count_);
        queries_.clear();
        for (int64_t i = 0; i < step.num_runs; i++) {
            const ServeRun& run = step.runs[i];
            const int32_t* blocks = step.blocks + run.first_block;
            for (int64_t t = run.start; t < run.stop; t++) {
                positions_[t] = static_cast<int>(run.position + t - run.start);
                block_tables_[t] = blocks;
            }
            add_queries(run.start, run.stop - run.start, run.position, blocks);
            num_wanted_ += static_cast<int>(run.num_wanted);
        }
        sort_queries();
    }

    // Keeps only the wanted tokens, run after run; `position` and `blocks` are unchanged. Calls move(from, to, count)
    // for consecutive tokens. No token is overwritten before it is moved.
    template <class Move>
    void keep_wanted(const ServeStep& step, Move move) {
        queries_.clear();
        count_ = 0;
        for (int64_t i = 0; i < step.num_runs; i++) {
            const ServeRun& run = step.runs[i];
            const int64_t first = run.stop - run.num_wanted;
            move(first, count_, run.num_wanted);
            add_queries(count_, run.num_wanted, run.position + first - run.start, step.blocks + run.first_block);
            count_ += static_cast<int>(run.num_wanted);
        }
        sort_queries();
    }

    int count() const { return count_; }
    int num_wanted() const { return num_wanted_; }
    int position(int token) const { return positions_[token]; }
    const int32_t* blocks(int token) const { return block_tables_[token]; }
    // The queries that see the most positions come last.
    const std::vector<Query>& queries() const { return queries_; }

  private:
    void add_queries(int64_t start, int64_t count, int64_t position, const int32_t* blocks) {
        for (int64_t t = 0; t < count; t += max_query_) {
            const int64_t stop = start + std::min(t + max_query_, count);
            queries_.push_back(
                {static_cast<int>(start + t), static_cast<int>(stop), static_cast<int>(position + t), blocks});
        }
    }
    void sort_queries() {
        std::sort(queries_.begin(), queries_.end(),
                  [](const Query& one, const Query& other) { return one.length() < other.length(); });
    }

    int max_query_ = 1, count_ = 0, num_wanted_ = 0;
    std::vector<int> positions_;
    std::vector<const int32_t*> block_tables_;
    std::vector<Query> queries_;
};

// The layers of the forward pass, from token ids to the residual stream after the last layer.
class Layers {
  public:
    // Keeps its arguments. `rotary` is (2, max_positions, head_dim), as `rotary_table` makes it.
    Layers(const BaseSizes& sizes, const float* rotary, const ServeBase& base, Team& team, StepClock& clock)
        : sizes_(sizes),
          heads_(static_cast<int>(sizes.heads)),
          kv_heads_(static_cast<int>(sizes.kv_heads)),
          head_dim_(static_cast<int>(sizes.head_dim)),
          rotary_(rotary),
          base_(base),
          team_(team),
          clock_(clock),
          attention_(heads_, team.size()),
          scratch_(sizes.threads) {}

    // Resizes the buffers for this step.
    void prepare(const ServeStep& step) {
        const int64_t count = step.num_tokens;
        tokens_.plan(step, std::max(kQueryRows / (heads_ / kv_heads_), 1));
        set_chunks();
        residual_.resize(count * sizes_.hidden);
        x_.resize(count * sizes_.hidden);
        q_.resize(count * q_size());
        attn_out_.resize(count * q_size());
        active_.resize(count * sizes_.intermediate);
        lora_.plan(step);
    }

    int num_wanted() const { return tokens_.num_wanted(); }

    // Computes all layers. All tokens' keys and values go into the cache. In the last layer only the wanted tokens
    // compute anything else. If any token is wanted, `end` is called after the last layer, in the team's job.
    template <class End>
    void run(const ServeStep& step, End end) {
        const int64_t layer_size = step.block_size * kv_heads_ * head_dim_;  // of keys or values in a block
        const int last = static_cast<int>(sizes_.layers) - 1;
        auto cache = [&](int layer) {
            return CacheView{step.k + layer * layer_size,
                             step.v + layer * layer_size,
                             static_cast<int>(step.block_size),
                             kv_heads_,
                             head_dim_,
                             static_cast<size_t>(sizes_.layers * layer_size)};
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
            team_.run([&] {
                begin();
                finish();
            });
            return;
        }
        team_.run(begin);
        if (tokens_.num_wanted() == 0) return clock_.end(kQkvPhase);
        keep_wanted(step);
        attention_.plan(tokens_.queries(), cache(last), team_.active());
        team_.run(finish);
    }

    // y (wanted, hidden): the final hidden states. Called by the `end` of `run`.
    void final_norm(bf16* y) { norm(base_.final_norm, y); }

  private:
    struct alignas(64) LayerScratch {  // one thread's
        std::vector<float> y;
        ExpandedTile tiles[2];
        WideRows wide;          // of the phase's x
        PrefetchList prefetch;  // empty between products
    };
    LayerScratch& scratch() { return scratch_[Team::number()]; }

    int64_t q_size() const { return sizes_.heads * sizes_.head_dim; }
    void set_chunks() { chunks_ = (tokens_.count() + kChunk - 1) / kChunk; }

    // Reduces the last layer's queries, the residual stream and the adapters to the wanted tokens.
    void keep_wanted(const ServeStep& step) {
        tokens_.keep_wanted(step, [&](int64_t from, int64_t to, int64_t count) {
            std::copy_n(&residual_[from * sizes_.hidden], count * sizes_.hidden, &residual_[to * sizes_.hidden]);
            std::copy_n(&q_[from * q_size()], count * q_size(), &q_[to * q_size()]);
        });
        set_chunks();
        lora_.keep_wanted(step);
    }

    // Computes queries, and puts keys and values into the cache.
    void begin_layer(int layer, const CacheView& cache) {
        norm(base_.layers[layer].input_norm, x_.data());
        clock_.end(kNormPhase);
        project_qkv_to_cache(layer, cache);
    }

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
            const bf16* row = base_.embed + step.token_ids[t] * sizes_.hidden;
            for (int64_t i = 0; i < sizes_.hidden; i += 16)
                store(&residual_[t * sizes_.hidden + i], load_bf16(row + i));
        });
    }

    // y (tokens, hidden) = the RMSNorm of the residual stream, with `weight`.
    void norm(const bf16* weight, bf16* y) {
        team_.each((tokens_.count() + kNormRows - 1) / kNormRows, [&](int item) {
            for (int row = item * kNormRows; row < std::min(tokens_.count(), (item + 1) * kNormRows); row++)
                rms_norm(&residual_[row * sizes_.hidden], weight, sizes_.hidden, sizes_.eps, y + row * sizes_.hidden);
        });
    }

    // Calls item(column item, first row, rows) for a product with a group's x. The adapters' products with A come
    // first.
    template <class Item>
    void product(int layer, Group group, const bf16* x, int columns, Item item) {
        LoraGroup& lora = lora_[group];
        scratch().wide.begin(columns / team_.active());
        auto shrink = [&](int task) { lora.shrink(layer, task, x); };
        team_.each(lora.num_tasks(), shrink, columns * chunks_, [&](int i) {
            const int start = i % chunks_ * kChunk;
            item(i / chunks_, start, std::min(tokens_.count() - start, kChunk));
        });
    }

    // y (rows, 32) = the outputs of one tile of x Wᵀ with the adapters' share, for rows [start, start + rows). Expanded
    // tiles are kept for the next rows of the same columns; an item with two tiles gives each its own `slot`. The
    // operands that adapters read next are prefetched meanwhile.
    void forward_tile(int layer, const Matrix& w, Group group, const bf16* x, int tile, int start, int rows, float* y,
                      int y_stride, int slot) {
        const LoraGroup& lora = lora_[group];
        LayerScratch& own = scratch();
        lora_.add_to(own.prefetch, layer, group, start, rows, tile * kTile, tile * chunks_ + start / kChunk,
                     w.num_tiles() * chunks_);
        w.multiply(own.wide.rows(x, static_cast<size_t>(w.in()), start, rows), rows, tile, y, y_stride,
                   own.tiles[chunks_ > 1 ? slot : 0], own.prefetch);
        if (lora.num_tasks() == 0) return;
        team_.wait_first(lora.num_tasks());
        lora.expand(layer, start, rows, tile * kTile, y, y_stride);
    }

    // Writes x's rotated queries to q_, and its rotated keys and its values to the cache. An item is a head.
    void project_qkv_to_cache(int layer, const CacheView& cache) {
        product(layer, kQkv, x_.data(), heads_ + 2 * kv_heads_, [&](int head, int start, int rows) {
            const int tiles = head_dim_ / kTile;
            float* y = room(scratch().y, kChunk * head_dim_);
            for (int tile = 0; tile < tiles; tile++)
                forward_tile(layer, base_.layers[layer].qkv, kQkv, x_.data(), head * tiles + tile, start, rows,
                             y + tile * kTile, head_dim_, tile % 2);
            for (int row = 0; row < rows; row++) {
                const int token = start + row, position = tokens_.position(token);
                const int32_t* blocks = tokens_.blocks(token);
                float* values = y + row * head_dim_;
                if (head < heads_ + kv_heads_ && base_.layers[layer].uses_rotary)
                    rotate(values, rotary_, sizes_.max_positions, head_dim_, position, false);
                if (head >= heads_ + kv_heads_)
                    cache.put_value(blocks, position, head - heads_ - kv_heads_, values);
                else if (head >= heads_)
                    cache.put_key(blocks, position, head - heads_, values);
                else
                    round_to_bf16(values, head_dim_, &q_[token * q_size() + head * head_dim_]);
            }
        });
    }

    // The residual stream += W x, for the two modules that write to it.
    void project_residual(int layer, const Matrix& w, Group group, const bf16* x) {
        product(layer, group, x, static_cast<int>(sizes_.hidden / kTile), [&](int tile, int start, int rows) {
            float y[kChunk * kTile];
            forward_tile(layer, w, group, x, tile, start, rows, y, kTile, 0);
            for (int row = 0; row < rows; row++) {
                float* residual = &residual_[(start + row) * sizes_.hidden + tile * kTile];
                for (int i = 0; i < kTile; i += 16) store(residual + i, load(residual + i) + load(y + row * kTile + i));
            }
        });
    }

    // active_ = silu(gate x) · up x
    void activate(int layer) {
        const int tiles = static_cast<int>(sizes_.intermediate / kTile);
        const Matrix& w = base_.layers[layer].gate_up;
        product(layer, kGateUp, x_.data(), tiles, [&](int tile, int start, int rows) {
            float gate[kChunk * kTile], up[kChunk * kTile];
            forward_tile(layer, w, kGateUp, x_.data(), tile, start, rows, gate, kTile, 0);
            forward_tile(layer, w, kGateUp, x_.data(), tiles + tile, start, rows, up, kTile, 1);
            for (int row = 0; row < rows; row++)
                for (int i = 0; i < kTile; i += 16) {
                    const F32x16 g = load(gate + row * kTile + i);
                    const F32x16 u = load(up + row * kTile + i);
                    store_bf16(&active_[(start + row) * sizes_.intermediate + tile * kTile + i], silu(g) * u);
                }
        });
    }

    const BaseSizes& sizes_;
    const int heads_, kv_heads_, head_dim_;
    const float* rotary_;
    const ServeBase& base_;
    Team& team_;
    StepClock& clock_;

    StepTokens tokens_;
    int chunks_ = 0;
    std::vector<float> residual_;
    std::vector<bf16> x_, q_, attn_out_, active_;
    StepAttention attention_;
    LoraGroups lora_;
    std::vector<LayerScratch> scratch_;
};

// Logits and the choice of tokens. All threads of a team call each method, within a job.
class Head {
  public:
    // Keeps its arguments.
    Head(const BaseSizes& sizes, const Matrix& lm_head, Team& team, StepClock& clock)
        : sizes_(sizes), lm_head_(lm_head), team_(team), clock_(clock), scratch_(sizes.threads) {}

    // logits (rows, vocab) of hidden (rows, hidden).
    void project(const bf16* hidden, int rows, float* logits) {
        const int tiles = static_cast<int>(sizes_.vocab / kTile);
        scratch().wide.begin(tiles / team_.active());
        team_.each(tiles, [&](int tile) {
            HeadScratch& own = scratch();
            lm_head_.multiply(own.wide.rows(hidden, sizes_.hidden, 0, rows), rows, tile, logits + tile * kTile,
                              sizes_.vocab, own.tile, own.prefetch);
        });
    }

    // Chooses each row's next token. Computes `logits` first if hidden states are given.
    void choose(const SampleStep& step, float* logits) {
        const int rows = static_cast<int>(step.num_rows);
        if (step.hidden) project(step.hidden, rows, logits);
        clock_.end(kHeadPhase);
        team_.each(rows, [&](int row) {
            scratch().sampler.run(step, step.rows[row], logits + row * sizes_.vocab, sizes_.vocab, step.token_ids + row,
                                  step.logprobs + row * (1 + step.max_top), step.top_ids + row * step.max_top);
        });
    }

  private:
    struct alignas(64) HeadScratch {  // one thread's
        ExpandedTile tile;
        PrefetchList prefetch;  // empty
        WideRows wide;          // of the hidden states
        RowSampler sampler;
    };
    HeadScratch& scratch() { return scratch_[Team::number()]; }

    const BaseSizes& sizes_;
    const Matrix& lm_head_;
    Team& team_;
    StepClock& clock_;
    std::vector<HeadScratch> scratch_;
};

class Model {
  public:
    Model(const BaseSizes& sizes, const BaseTensor* tensors, const float* rotary, const uint8_t* uses_rotary)
        : sizes_(sizes),
          team_(static_cast<int>(sizes.threads)),
          base_(sizes, tensors, uses_rotary, team_),
          layers_(sizes_, rotary, base_, team_, clock_),
          head_(sizes_, base_.lm_head, team_, clock_) {}

    // Computes the final hidden states of the wanted tokens.
    void forward(const ServeStep& step) {
        prepare(step);
        layers_.run(step, [&] { layers_.final_norm(step.hidden); });
        clock_.end(kNormPhase);
    }

    // Chooses the next token after each wanted token.
    void draw(const ServeStep& step, SampleStep sampling) {
        prepare(step);
        const int64_t rows = layers_.num_wanted();
        if (sampling.num_rows != rows) refuse("%ld rows for %ld hidden states", sampling.num_rows, rows);
        if (sampling.hidden != nullptr) refuse("hidden states of another step");
        bf16* hidden = room(hidden_, rows * sizes_.hidden);
        sampling.hidden = hidden;
        check_sampling(sizes_, sampling);
        float* logits = room(logits_, rows * sizes_.vocab);
        layers_.run(step, [&] {
            layers_.final_norm(hidden);
            clock_.end(kNormPhase);
            head_.choose(sampling, logits);
        });
        clock_.end(kSamplingPhase);
    }

    // logits (rows, vocab) of hidden (rows, hidden).
    void project(const bf16* hidden, int64_t rows, float* logits) {
        if (rows < 0 || rows > kMaxTokens) refuse("%ld rows", rows);
        clock_.begin();
        team_.run([&] { head_.project(hidden, static_cast<int>(rows), logits); });
        clock_.end(kHeadPhase);
    }

    // Chooses the next token of each row of hidden states or logits.
    void sample(const SampleStep& step) {
        clock_.begin();
        check_sampling(sizes_, step);
        float* logits = step.logits ? step.logits : room(logits_, step.num_rows * sizes_.vocab);
        team_.run([&] { head_.choose(step, logits); });
        clock_.end(kSamplingPhase);
    }

    StepClock& clock() { return clock_; }

  private:
    void prepare(const ServeStep& step) {
        clock_.begin();
        check_step(sizes_, step);
        team_.set_active(static_cast<int>(step.num_threads ? step.num_threads : sizes_.threads));
        layers_.prepare(step);
    }

    const BaseSizes sizes_;
    Team team_;
    const ServeBase base_;
    StepClock clock_;
    Layers layers_;
    Head head_;

    std::vector<float> logits_;
    std::vector<bf16> hidden_;
};

Model& model_of(void* model) { return *static_cast<Model*>(model); }

}  // namespace

int smolora_create(const BaseSizes* sizes, const BaseTensor* tensors, const float* rotary, const uint8_t* uses_rotary,
                   void** model, char* error) {
    return guarded(error, [&] {
        check_sizes(*sizes);
        *model = new Model(*sizes, tensors, rotary, uses_rotary);
    });
}

void smolora_destroy(void* model) { delete static_cast<Model*>(model); }

int smolora_forward(void* model, const ServeStep* step, char* error) {
    return guarded(error, [&] { model_of(model).forward(*step); });
}

int smolora_logits(void* model, const bf16* hidden, int64_t rows, float* logits, char* error) {
    return guarded(error, [&] { model_of(model).project(hidden, rows, logits); });
}

int smolora_sample(void* model, const SampleStep* step, char* error) {
    return guarded(error, [&] { model_of(model).sample(*step); });
}

int smolora_draw(void* model, const ServeStep* step, const SampleStep* sampling, char* error) {
    return guarded(error, [&] { model_of(model).draw(*step, *sampling); });
}

int smolora_phases(void* model, int64_t is_on, int64_t* nanoseconds, char* error) {
    return guarded(error, [&] {
        const auto spent = model_of(model).clock().take(is_on != 0);
        std::copy(spent.begin(), spent.end(), nanoseconds);
    });
}
