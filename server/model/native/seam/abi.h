// What crosses the seam between Python and C++: structs, constants and the library's entries.
//
// Every field takes eight bytes, so that no padding has to be agreed on. `smolora_layout` lists offsets, sizes and
// constants; abi.py declares the same structs and compares its own list with the library's when it is loaded.
#pragma once
#include <cstddef>
#include <cstdint>

using bf16 = uint16_t;

constexpr int kTile = 32;        // outputs of a packed tile: sizes of the base are multiples of it
constexpr int kRowUnit = 16;     // a module's rows in training begin at a multiple of it, and are one
constexpr int kMaxGroup = 8;     // query heads that share a kv head, at most
constexpr int kPositions = 16;   // of a sequence that lie together in the cache: blocks are multiples of it
constexpr int kErrorSize = 256;  // bytes of an error's text, its end included

enum Group { kQkv, kO, kGateUp, kDown, kGroups };  // in the order of rank_rows.GROUPS

// Of a step of serving, in order; kNormPhase is there between others.
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

// A layer's tensors, in the order of weights.LAYER_TENSORS.
enum LayerTensor { kInputNormTensor, kQkvTensor, kOTensor, kPostNormTensor, kGateUpTensor, kDownTensor, kLayerTensors };

// Of a step of training, in order; kRowsPhase and kRowsBackwardPhase are there between others.
enum TrainPhase {
    kRowsPhase,      // embedding, norms and x Aᵀ
    kProductsPhase,  // with the base's weights and B, and what is done with their outputs
    kSelfAttentionPhase,
    kLossPhase,
    kRowsBackwardPhase,      // norms and dy Bᵀ
    kProductsBackwardPhase,  // with the base's weights and A, the activation, and the gradients of A and B
    kSelfAttentionBackwardPhase,
    kTrainPhases
};

enum Status {  // what an entry answers
    kOk,
    kNoMemory,  // or no thread: the same call may succeed later
    kInvalid,   // the arguments; nothing was computed
    kFailed,
};

enum WeightType { kBf16, kQ4_1, kQ8_0 };  // as GGUF names them; the last two in blocks of kTile inputs

struct BaseTensor {  // of a base: row-major values, and the blocks that expand to them, where they were stored so
    const bf16* values;
    int64_t type;
    const uint8_t* blocks;
};

struct BaseSizes {
    int64_t vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, max_positions, threads;
    double eps;
};

// Serving.

// Tokens [start, stop) of the step, one sequence's, the first of them at `position`. Its block table begins at
// `first_block` in `blocks`; the hidden states of its last `num_wanted` tokens are wanted.
struct ServeRun {
    int64_t start, stop, position, first_block, num_wanted;
};

struct LoraModule {
    int64_t rank, row, offset, out_start, out_features;  // row, offset: from the part's first row and number of B
};

struct LoraPart {  // one weighted adapter of a segment, in one group
    int64_t first_row, num_rows, first_module, num_modules, b_offset, b_size;  // b_offset, b_size: numbers of B
};

struct LoraSegment {  // tokens [start, stop) under the same parts
    int64_t start, stop, first_part, num_parts;
};

// Of one group: `rows` rows of A and `b_size` numbers of B a layer, packed as lora/group.h says. What a part has of all
// layers lies together, one layer after the other, and so that it begins `layers` times as far from the pool's begin.
struct LoraPool {
    const bf16 *a, *b;
    int64_t layers, rows, b_size, in;
    const LoraPart* parts;
};

struct ServeStep {
    int64_t num_threads;  // that compute it, at most the base's; 0: all of those
    int64_t num_tokens, num_runs;
    const int64_t* token_ids;
    const ServeRun* runs;
    const int32_t* blocks;  // the runs' block tables, one after the other
    int64_t num_table_blocks;
    bf16 *k, *v;  // (num_blocks, layers, block_size, kv_heads, head_dim)
    int64_t num_blocks, block_size;
    const LoraPool* pools;  // of each group
    const LoraModule* modules;
    const LoraSegment* segments;
    const double* weights;  // of each part
    int64_t num_modules, num_segments, num_parts;
    bf16* hidden;  // (the runs' num_wanted, hidden): the answer
};

struct SampleRow {              // how one row's token is chosen
    double temperature;         // 0: the likeliest
    double top_p, min_p;        // 1 and 0: off
    int64_t top_k;              // 0: off
    int64_t key;                // of the noise
    int64_t num_top;            // of the likeliest tokens, whose log-probabilities are told; 0: nor is the chosen one's
    const uint8_t* forbidden;   // (vocab): not 0 for what may not be chosen; or null
    double repetition_penalty;  // of the row's part of `seen`
    int64_t first_seen, num_seen;    // of the step's `seen`
    int64_t first_added, num_added;  // of the step's `added`, which follows the repetition penalty
};

struct SampleStep {
    int64_t num_rows;
    const bf16* hidden;  // (num_rows, hidden), or null where the logits are given
    float* logits;       // (num_rows, vocab), which are overwritten; null where they are those of `hidden`
    const SampleRow* rows;
    const int64_t* seen;
    int64_t num_seen;
    const int64_t* added_ids;  // tokens, and what is added to their logits
    const double* added;
    int64_t num_added, max_top;
    int64_t* token_ids;  // (num_rows): the answer; -1 where logits are NaN or infinite, or none may be chosen
    float* logprobs;     // (num_rows, 1 + max_top): the chosen token's and the likeliest ones', best first
    int64_t* top_ids;    // (num_rows, max_top): the likeliest tokens; -1 behind the last that has a finite logit
};

// Training.

// `rank` rows of A and B, in units of kRowUnit; B is zero outside the module's features. The first `trained` rows of
// both are trained: the backward pass adds `scaling` times the gradient of A to `gradients` from a_start on, as
// (trained, in), and that of B from b_start on, as (features, trained). Where `repeats` is 2, as many rows of A follow
// that are the same but for a constant; their gradient is added likewise.
struct TrainModule {
    int64_t row, rank, out_start, out_features, trained, repeats, a_start, b_start;
    double scaling;
};

struct TrainGroup {  // one layer's group: A (rows, in) and B (rows, out)
    const bf16 *a, *b;
    int64_t rows;
    const TrainModule* modules;
    int64_t num_modules;
    const uint8_t* kept;  // (tokens, in): which features of x A meets, or null for all
};

struct TrainBatch {  // texts one after the other; text i has the tokens [starts[i], starts[i + 1])
    int64_t num_tokens, num_texts;
    const int64_t *token_ids, *starts;
    const TrainGroup* lora;  // (layers, kGroups)
    float* gradients;        // of all modules
    int64_t num_gradients;
    double factor;            // of the features that are kept
    int64_t has_backward;     // whether a backward pass may follow; else nothing is kept for it
    float* const* d_weights;  // of the base's tensors, in their order: what the backward pass adds their gradients to,
                              // but for the head's; null where the base is frozen
};

// What smolora_layout lists.
struct Number {
    const char* name;
    int64_t value;
};

#define SMOLORA_ENTRY extern "C" __attribute__((visibility("default")))

SMOLORA_ENTRY const Number* smolora_layout();  // sizes, offsets and constants; the last name is null
SMOLORA_ENTRY const char* smolora_compiler();  // which compiler made this library, with which flags
SMOLORA_ENTRY int smolora_is_supported();      // by this processor

// Each of the following answers a Status, and where it isn't kOk `error` (kErrorSize bytes) says why. After a failure
// what was created can be used on: a step that failed may be tried again.

// tensors: embed, then of each layer input_norm, qkv, o, post_norm, gate_up and down, then final_norm and lm_head; they
// and rotary stay the caller's, and must stay.
SMOLORA_ENTRY int smolora_create(const BaseSizes* sizes, const BaseTensor* tensors, const float* rotary,
                                 const uint8_t* uses_rotary, void** model, char* error);
SMOLORA_ENTRY void smolora_destroy(void* model);
SMOLORA_ENTRY int smolora_forward(void* model, const ServeStep* step, char* error);
SMOLORA_ENTRY int smolora_logits(void* model, const bf16* hidden, int64_t rows, float* logits, char* error);
SMOLORA_ENTRY int smolora_sample(void* model, const SampleStep* step, char* error);
// Forward and sample in one, of a row for each token that is wanted; their hidden states are in neither step.
SMOLORA_ENTRY int smolora_draw(void* model, const ServeStep* step, const SampleStep* sampling, char* error);
// How long each phase took since the last time that this was called (kPhases numbers); from now on it is counted, or
// not, as it isn't at first.
SMOLORA_ENTRY int smolora_phases(void* model, int64_t is_on, int64_t* nanoseconds, char* error);

SMOLORA_ENTRY int smolora_training_create(const BaseSizes* sizes, const BaseTensor* tensors, const float* rotary,
                                          const uint8_t* uses_rotary, void** training, char* error);
SMOLORA_ENTRY void smolora_training_destroy(void* training);
// What the batch leads to must stay until the backward pass, which comes once after each forward pass, or not at all.
SMOLORA_ENTRY int smolora_training_forward(void* training, const TrainBatch* batch, bf16* hidden, char* error);
// `factor` times the head's gradient is added to d_head (vocab, hidden), unless that is null.
SMOLORA_ENTRY int smolora_training_loss(void* training, const bf16* hidden, const int64_t* targets, int64_t rows,
                                        double factor, bf16* d_hidden, float* d_head, double* loss, char* error);
// Each row's cross-entropy and likeliest token.
SMOLORA_ENTRY int smolora_training_measure(void* training, const bf16* hidden, const int64_t* targets, int64_t rows,
                                           double* losses, int64_t* likeliest, char* error);
SMOLORA_ENTRY int smolora_training_backward(void* training, const bf16* d_hidden, char* error);
// As smolora_phases (kTrainPhases numbers).
SMOLORA_ENTRY int smolora_training_phases(void* training, int64_t is_on, int64_t* nanoseconds, char* error);
