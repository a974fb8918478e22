// What the library says of itself: how its structs lie, which compiler made it, and whether this processor can run it.
#include "abi.h"

#include "kernels/blocks/amx.h"

namespace {

// The fields of each struct in their order, with their offsets, before its size.
#define AT(type, field) {#type "." #field, sizeof(type::field) == 8 ? (int64_t)offsetof(type, field) : -1}
#define SIZE(type) {#type, sizeof(type)}
// clang-format off
constexpr Number kLayout[] = {
    AT(BaseTensor, values), AT(BaseTensor, type), AT(BaseTensor, blocks), SIZE(BaseTensor),
    AT(BaseSizes, vocab), AT(BaseSizes, hidden), AT(BaseSizes, intermediate), AT(BaseSizes, layers),
    AT(BaseSizes, heads), AT(BaseSizes, kv_heads), AT(BaseSizes, head_dim), AT(BaseSizes, max_positions),
    AT(BaseSizes, threads), AT(BaseSizes, eps), SIZE(BaseSizes),
    AT(ServeRun, start), AT(ServeRun, stop), AT(ServeRun, position), AT(ServeRun, first_block),
    AT(ServeRun, num_wanted), SIZE(ServeRun),
    AT(LoraModule, rank), AT(LoraModule, row), AT(LoraModule, offset), AT(LoraModule, out_start),
    AT(LoraModule, out_features), SIZE(LoraModule),
    AT(LoraPart, first_row), AT(LoraPart, num_rows), AT(LoraPart, first_module), AT(LoraPart, num_modules),
    AT(LoraPart, b_offset), AT(LoraPart, b_size), SIZE(LoraPart),
    AT(LoraSegment, start), AT(LoraSegment, stop), AT(LoraSegment, first_part), AT(LoraSegment, num_parts),
    SIZE(LoraSegment),
    AT(LoraPool, a), AT(LoraPool, b), AT(LoraPool, layers), AT(LoraPool, rows), AT(LoraPool, b_size),
    AT(LoraPool, in), AT(LoraPool, parts), SIZE(LoraPool),
    AT(ServeStep, num_threads), AT(ServeStep, num_tokens), AT(ServeStep, num_runs), AT(ServeStep, token_ids),
    AT(ServeStep, runs), AT(ServeStep, blocks), AT(ServeStep, num_table_blocks), AT(ServeStep, k), AT(ServeStep, v),
    AT(ServeStep, num_blocks), AT(ServeStep, block_size), AT(ServeStep, pools), AT(ServeStep, modules),
    AT(ServeStep, segments), AT(ServeStep, weights), AT(ServeStep, num_modules), AT(ServeStep, num_segments),
    AT(ServeStep, num_parts), AT(ServeStep, hidden), SIZE(ServeStep),
    AT(SampleRow, temperature), AT(SampleRow, top_p), AT(SampleRow, min_p), AT(SampleRow, top_k), AT(SampleRow,
    key), AT(SampleRow, num_top), AT(SampleRow, forbidden), AT(SampleRow, repetition_penalty), AT(SampleRow,
    first_seen), AT(SampleRow, num_seen), AT(SampleRow, first_added), AT(SampleRow, num_added), SIZE(SampleRow),
    AT(SampleStep, num_rows), AT(SampleStep, hidden), AT(SampleStep, logits), AT(SampleStep, rows),
    AT(SampleStep, seen), AT(SampleStep, num_seen), AT(SampleStep, added_ids), AT(SampleStep, added),
    AT(SampleStep, num_added), AT(SampleStep, max_top), AT(SampleStep, token_ids), AT(SampleStep, logprobs),
    AT(SampleStep, top_ids), SIZE(SampleStep),
    AT(TrainModule, row), AT(TrainModule, rank), AT(TrainModule, out_start), AT(TrainModule, out_features),
    AT(TrainModule, trained), AT(TrainModule, repeats), AT(TrainModule, a_start), AT(TrainModule, b_start),
    AT(TrainModule, scaling), SIZE(TrainModule),
    AT(TrainGroup, a), AT(TrainGroup, b), AT(TrainGroup, rows),
    AT(TrainGroup, modules), AT(TrainGroup, num_modules), AT(TrainGroup, kept), SIZE(TrainGroup),
    AT(TrainBatch, num_tokens), AT(TrainBatch, num_texts), AT(TrainBatch, token_ids), AT(TrainBatch, starts),
    AT(TrainBatch, lora), AT(TrainBatch, gradients), AT(TrainBatch, num_gradients), AT(TrainBatch, factor), AT(TrainBatch, has_backward), AT(TrainBatch, d_weights), SIZE(TrainBatch),
    {"kTile", kTile}, {"kRowUnit", kRowUnit}, {"kMaxGroup", kMaxGroup}, {"kPositions", kPositions}, {"kErrorSize", kErrorSize},
    {"group qkv", kQkv}, {"group o", kO}, {"group gate_up", kGateUp}, {"group down", kDown}, {"weight type BF16", kBf16}, {"weight type Q4_1", kQ4_1}, {"weight type Q8_0", kQ8_0}, {"kOk", kOk},
    {"kNoMemory", kNoMemory}, {"kInvalid", kInvalid}, {"kFailed", kFailed},
    {"layer tensor input_norm", kInputNormTensor}, {"layer tensor qkv", kQkvTensor}, {"layer tensor o", kOTensor},
    {"layer tensor post_norm", kPostNormTensor}, {"layer tensor gate_up", kGateUpTensor},
    {"layer tensor down", kDownTensor},
    {"phase embed", kEmbedPhase}, {"phase norm", kNormPhase}, {"phase qkv", kQkvPhase}, {"phase attention", kAttentionPhase},
    {"phase o", kOPhase}, {"phase gate_up", kGateUpPhase}, {"phase down", kDownPhase}, {"phase head", kHeadPhase},
    {"phase sampling", kSamplingPhase},
    {"train phase rows", kRowsPhase}, {"train phase products", kProductsPhase},
    {"train phase attention", kSelfAttentionPhase}, {"train phase loss", kLossPhase},
    {"train phase rows backward", kRowsBackwardPhase}, {"train phase products backward", kProductsBackwardPhase},
    {"train phase attention backward", kSelfAttentionBackwardPhase},
    {nullptr, 0},
};
// clang-format on

// Whether each struct has the fields that are listed, in this order, of eight bytes each, and no others.
constexpr bool is_dense() {
    int64_t offset = 0;
    for (const Number* number = kLayout; *number->name != 'k'; number++) {  // constants follow
        if (number->value != offset) return false;
        bool is_field = false;
        for (const char* c = number->name; *c; c++) is_field = is_field || *c == '.';
        offset = is_field ? offset + 8 : 0;
    }
    return true;
}
static_assert(is_dense(), "structs of abi.h have other fields than are listed here, or padding");

}  // namespace

const Number* smolora_layout() { return kLayout; }

const char* smolora_compiler() {
#ifdef __clang__
#define MADE_BY __VERSION__ " " SMOLORA_FLAGS
#else
#define MADE_BY "g++ " __VERSION__ " " SMOLORA_FLAGS
#endif
    return has_amx() ? MADE_BY ", with AMX" : MADE_BY;
}

int smolora_is_supported() { return vectors::is_supported(); }
