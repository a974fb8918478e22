// The seam between Python and C++: structs, constants and the library's entries.
//
// abi.py reads this file, so nothing is declared twice. It understands int64_t, double and pointers as fields and
// parameters, which all take eight bytes; `constexpr int`; and enumerators without a value, named as the enum's last
// word has it (kNormPhase of Phase) or not (kQkv of Group).
#pragma once
#include <cstddef>
#include <cstdint>

using bf16 = uint16_t;

constexpr int kTile = 32;        // outputs that are computed together: the base's sizes are multiples of it
constexpr int kRowUnit = 16;     // in training a module's rows begin at a multiple of it; zero rows fill the last unit
constexpr int kMaxGroup = 8;     // query heads that share a kv head, at most
constexpr int kPositions = 16;   // positions stored together in the cache: a block has a multiple of it
constexpr int kErrorSize = 256;  // bytes of an error's text, its end included

constexpr int kDropoutShares = 65536;  // dropout's probability is a multiple of 1 / kDropoutShares
// The step of the Weyl sequence in kernels/dropout.h, and the multipliers of its hash.
constexpr int kDropoutStep = 1640531527;
constexpr int kDropoutFirst = 569420461;
constexpr int kDropoutSecond = 1935289751;

enum Group { kQkv, kO, kGateUp, kDown, kGroups };  // as rank_rows.GROUPS

// The phases of a serving step, in order, except kNormPhase, which comes between others.
enum Phase {
    kEmbedPhase,
    kNormPhase,
    kQkvPhase,
    kAttentionPhase,
    kOPhase,
    kGateUpPhase,
    kDownPhase,
    kHeadPhase,
    kSamplingPhase,
    kPhases
};

// A layer's tensors, as weights.LAYER_TENSORS.
enum LayerTensor { kInputNormTensor, kQkvTensor, kOTensor, kPostNormTensor, kGateUpTensor, kDownTensor, kLayerTensors };

// The phases of a training step, in order, except kRowsPhase and kRowsBackwardPhase, which come between others.
enum TrainPhase {
    kRowsPhase,      // embedding, norms and x Aᵀ
    kProductsPhase,  // products with the base's weights and B, then the activation or the residual
    kSelfAttentionPhase,
    kLossPhase,
    kRowsBackwardPhase,      // norms and dy Bᵀ
    kProductsBackwardPhase,  // products with the base's weights and A, the activation, the gradients of A and B
    kSelfAttentionBackwardPhase,
    kTrainPhases
};

enum Status {  // what an entry returns
    kOk,
    kNoMemory,  // or no thread: the same call may succeed later
    kInvalid,   // invalid arguments: nothing was computed
    kFailed
};

enum WeightType { kBf16, kQ4_1, kQ8_0 };  // GGUF's names; the last two are in blocks of kTile inputs

struct BaseTensor {  // row-major values; `blocks`, if not null, expand to the same values
    const bf16* values;
    int64_t type;
    const uint8_t* blocks;
};

struct BaseSizes {
    int64_t vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, max_positions, threads;
    double eps;
};

// Serving.

// Tokens [start, stop) of the step belong to one sequence, the first at `position`. The sequence's block table begins
// at `first_block` in `blocks`. The final hidden states of the last `num_wanted` tokens are computed.
struct ServeRun {
    int64_t start, stop, position, first_block, num_wanted;
};

struct LoraModule {  // `row` and `offset` (in numbers of B) count from the part's first
    int64_t rank, row, offset, out_start, out_features;
};

struct LoraPart {  // one weighted adapter of a segment, in one group; b_offset and b_size are in numbers of B
    int64_t first_row, num_rows, first_module, num_modules, b_offset, b_size;
};

struct LoraSegment {  // tokens [start, stop) under the same parts
    int64_t start, stop, first_part, num_parts;
};

// One group's `rows` rows of A and `b_size` numbers of B per layer, packed as kernels/lora/group.h describes. A part's
// layers follow each other, so in the pool of all layers a part begins at `layers` times its own offset.
struct LoraPool {
    const bf16 *a, *b;
    int64_t layers, rows, b_size, in;
    const LoraPart* parts;
};

struct ServeStep {
    int64_t num_threads;  // at most the base's; 0: all of them
    int64_t num_tokens, num_runs;
    const int64_t* token_ids;
    const ServeRun* runs;
    const int32_t* blocks;  // the runs' block tables, one after the other
    int64_t num_table_blocks;
    bf16 *k, *v;  // (num_blocks, layers, block_size, kv_heads, head_dim)
    int64_t num_blocks, block_size;
    const LoraPool* pools;  // (kGroups)
    const LoraModule* modules;
    const LoraSegment* segments;
    const double* weights;  // (num_parts)
    int64_t num_modules, num_segments, num_parts;
    bf16* hidden;  // output: (sum of num_wanted, hidden)
};

struct SampleRow {                   // how one row's token is chosen
    double temperature;              // 0: greedy
    double top_p, min_p;             // 1 and 0: off
    int64_t top_k;                   // 0: off
    int64_t key;                     // seeds the noise
    int64_t num_top;                 // top log-probabilities to return; 0: not even the chosen token's
    const uint8_t* forbidden;        // (vocab): nonzero for forbidden tokens; or null
    double repetition_penalty;       // applied to the row's tokens in `seen`
    int64_t first_seen, num_seen;    // the row's tokens in the step's `seen`
    int64_t first_added, num_added;  // the row's numbers in the step's `added`, added after the repetition penalty
};

struct SampleStep {
    int64_t num_rows;
    const bf16* hidden;  // (num_rows, hidden), or null if logits are given
    float* logits;       // (num_rows, vocab), overwritten; null if hidden states are given
    const SampleRow* rows;
    const int64_t* seen;
    int64_t num_seen;
    const int64_t* added_ids;  // (num_added): tokens
    const double* added;       // (num_added): what is added to their logits
    int64_t num_added, max_top;
    int64_t* token_ids;  // output: (num_rows); -1 if a logit is NaN or infinite, or all tokens are forbidden
    float* logprobs;     // output: (num_rows, 1 + max_top): the chosen token's, then the top ones, best first
    int64_t* top_ids;    // output: (num_rows, max_top): the likeliest tokens; -1 after the last finite logit
};

// Training.

// `rank` rows of A and B, in units of kRowUnit; B is zero outside the module's features. The first `trained` rows of
// both are trained: the backward pass adds `scaling` times the gradient of A to `gradients` from a_start on, as
// (trained, in), and the gradient of B from b_start on, as (features, trained). If `repeats` is 2, another `trained`
// rows of A follow, equal to the first except for a constant; their gradient is added to the same numbers.
struct TrainModule {
    int64_t row, rank, out_start, out_features, trained, repeats, a_start, b_start;
    double scaling;
};

struct TrainGroup {  // one layer's group: A (rows, in) and B (rows, out)
    const bf16 *a, *b;
    int64_t rows;
    const TrainModule* modules;
    int64_t num_modules;
};

struct TrainBatch {  // text i has the tokens [starts[i], starts[i + 1])
    int64_t num_tokens, num_texts;
    const int64_t *token_ids, *starts;
    const TrainGroup* lora;  // (layers, kGroups)
    float* gradients;        // (num_gradients): the gradients of all modules
    int64_t num_gradients;
    const uint64_t* dropout_keys;  // (num_tokens): see kernels/dropout.h; null: no dropout of A's inputs
    int64_t num_dropped;           // how many of kDropoutShares features are dropped
    double factor;                 // what kept features are multiplied by
    int64_t has_backward;          // whether a backward pass may follow: only then is anything saved for it
    float* const* d_weights;  // one per tensor of the base: the backward pass adds the tensor's gradient to it, except
                              // the head's; null if the base is frozen
};

#define SMOLORA_ENTRY extern "C" __attribute__((visibility("default")))

SMOLORA_ENTRY const char* smolora_source();    // the digest of the library's source
SMOLORA_ENTRY const char* smolora_compiler();  // the compiler and its flags
SMOLORA_ENTRY int smolora_is_supported();      // whether this processor has the instructions

// Each of the following returns a Status. If it isn't kOk, `error` (kErrorSize bytes) says why. A failed call leaves
// its object usable: the same step may be tried again.

// tensors: embed, then each layer's LayerTensors, then final_norm and lm_head. The caller owns them and `rotary`, and
// keeps them until the object is destroyed.
SMOLORA_ENTRY int smolora_create(const BaseSizes* sizes, const BaseTensor* tensors, const float* rotary,
                                 const uint8_t* uses_rotary, void** model, char* error);
SMOLORA_ENTRY void smolora_destroy(void* model);
SMOLORA_ENTRY int smolora_forward(void* model, const ServeStep* step, char* error);
SMOLORA_ENTRY int smolora_logits(void* model, const bf16* hidden, int64_t rows, float* logits, char* error);
SMOLORA_ENTRY int smolora_sample(void* model, const SampleStep* step, char* error);
// Forward and sample in one, with one row per wanted token. Neither step has hidden states.
SMOLORA_ENTRY int smolora_draw(void* model, const ServeStep* step, const SampleStep* sampling, char* error);
// Fills in each phase's time since the last call (kPhases numbers), and turns the clock on or off. It is off at first.
SMOLORA_ENTRY int smolora_phases(void* model, int64_t is_on, int64_t* nanoseconds, char* error);

SMOLORA_ENTRY int smolora_training_create(const BaseSizes* sizes, const BaseTensor* tensors, const float* rotary,
                                          const uint8_t* uses_rotary, void** training, char* error);
SMOLORA_ENTRY void smolora_training_destroy(void* training);
// The backward pass runs at most once after each forward pass. Until then the caller keeps everything that `batch`
// points to.
SMOLORA_ENTRY int smolora_training_forward(void* training, const TrainBatch* batch, bf16* hidden, char* error);
// Adds `factor` times the head's gradient to d_head (vocab, hidden), unless that is null.
SMOLORA_ENTRY int smolora_training_loss(void* training, const bf16* hidden, const int64_t* targets, int64_t rows,
                                        double factor, bf16* d_hidden, float* d_head, double* loss, char* error);
// Fills in each row's cross-entropy and likeliest token.
SMOLORA_ENTRY int smolora_training_measure(void* training, const bf16* hidden, const int64_t* targets, int64_t rows,
                                           double* losses, int64_t* likeliest, char* error);
SMOLORA_ENTRY int smolora_training_backward(void* training, const bf16* d_hidden, char* error);
// Like smolora_phases, with kTrainPhases numbers.
SMOLORA_ENTRY int smolora_training_phases(void* training, int64_t is_on, int64_t* nanoseconds, char* error);
