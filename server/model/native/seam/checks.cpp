#include "checks.h"

#include <limits>

namespace {

// How many features a group's modules read, and how many they write, per token.
int64_t in_features(const BaseSizes& sizes, int group) {
    return group == kO ? sizes.heads * sizes.head_dim : group == kDown ? sizes.intermediate : sizes.hidden;
}
int64_t out_features(const BaseSizes& sizes, int group) {
    return group == kQkv      ? (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
           : group == kGateUp ? 2 * sizes.intermediate
                              : sizes.hidden;
}

// Whether [first, first + count) is within [0, size).
bool is_within(int64_t first, int64_t count, int64_t size) {
    return first >= 0 && count >= 0 && count <= size && first <= size - count;
}

void check_runs(const BaseSizes& sizes, const ServeStep& step) {
    if (step.num_runs < 0 || step.block_size < 1 || step.block_size % kPositions)
        refuse("%ld runs, blocks of %ld", step.num_runs, step.block_size);
    int64_t next = 0;
    for (int64_t i = 0; i < step.num_runs; i++) {
        const ServeRun& run = step.runs[i];
        if (run.start != next || run.stop <= run.start || run.stop > step.num_tokens)
            refuse("run %ld has the tokens [%ld, %ld) of %ld, after %ld", i, run.start, run.stop, step.num_tokens,
                   next);
        next = run.stop;
        if (!is_within(run.position, run.stop - run.start, sizes.max_positions))
            refuse("run %ld has %ld tokens from position %ld on, of %ld", i, run.stop - run.start, run.position,
                   sizes.max_positions);
        if (!is_within(0, run.num_wanted, run.stop - run.start))
            refuse("run %ld wants the hidden states of %ld of its %ld tokens", i, run.num_wanted, run.stop - run.start);
        const int64_t length = run.position + run.stop - run.start;
        const int64_t num_blocks = (length + step.block_size - 1) / step.block_size;
        if (!is_within(run.first_block, num_blocks, step.num_table_blocks))
            refuse("run %ld needs %ld blocks from %ld on, of a table of %ld", i, num_blocks, run.first_block,
                   step.num_table_blocks);
        for (int64_t k = run.first_block; k < run.first_block + num_blocks; k++)
            if (step.blocks[k] < 0 || step.blocks[k] >= step.num_blocks)
                refuse("block %d of run %ld is not one of the cache's %ld", step.blocks[k], i, step.num_blocks);
    }
    if (next != step.num_tokens) refuse("runs of %ld tokens for %ld", next, step.num_tokens);
}

// Checks one group's parts.
void check_parts(const BaseSizes& sizes, const ServeStep& step, int group) {
    const LoraPool& pool = step.pools[group];
    const int64_t out = out_features(sizes, group);
    if (pool.in != in_features(sizes, group) || pool.layers != sizes.layers || pool.rows < 0)
        refuse("group %d has rows of %ld numbers in %ld layers", group, pool.in, pool.layers);
    for (int64_t index = 0; index < step.num_parts; index++) {
        const LoraPart& part = pool.parts[index];
        if (!is_within(part.first_row, part.num_rows, pool.rows))
            refuse("part %ld of group %d has %ld rows from %ld on, of %ld", index, group, part.num_rows, part.first_row,
                   pool.rows);
        if (!is_within(part.b_offset, part.b_size, pool.b_size))
            refuse("part %ld of group %d has %ld numbers of B from %ld on, of %ld", index, group, part.b_size,
                   part.b_offset, pool.b_size);
        if (!is_within(part.first_module, part.num_modules, step.num_modules))
            refuse("part %ld of group %d has %ld modules from %ld on, of %ld", index, group, part.num_modules,
                   part.first_module, step.num_modules);
        for (int64_t i = part.first_module; i < part.first_module + part.num_modules; i++) {
            const LoraModule& module = step.modules[i];
            if (!is_within(module.row, module.rank, part.num_rows))
                refuse("module %ld has %ld rows from %ld on, of %ld", i, module.rank, module.row, part.num_rows);
            if (module.rank % 2) refuse("module %ld has %ld rows: they come in pairs", i, module.rank);
            if (!is_within(module.out_start, module.out_features, out) || module.out_start % kTile ||
                module.out_features % kTile)
                refuse("module %ld has %ld outputs from %ld on, of %ld", i, module.out_features, module.out_start, out);
            if (!is_within(module.offset, module.out_features * module.rank, part.b_size))
                refuse("module %ld begins at %ld of its part's %ld numbers of B", i, module.offset, part.b_size);
        }
    }
}

void check_lora(const BaseSizes& sizes, const ServeStep& step) {
    int64_t next = 0;
    for (int64_t i = 0; i < step.num_segments; i++) {
        const LoraSegment& segment = step.segments[i];
        if (segment.start < next || segment.stop < segment.start || segment.stop > step.num_tokens)
            refuse("segment %ld has the tokens [%ld, %ld) of %ld, after %ld", i, segment.start, segment.stop,
                   step.num_tokens, next);
        next = segment.stop;
        if (!is_within(segment.first_part, segment.num_parts, step.num_parts))
            refuse("segment %ld has %ld parts from %ld on, of %ld", i, segment.num_parts, segment.first_part,
                   step.num_parts);
    }
    for (int group = 0; group < kGroups; group++) {
        check_parts(sizes, step, group);
        int64_t num_products = 0;  // kernels count them with an int
        for (int64_t i = 0; i < step.num_segments; i++) {
            const LoraSegment& segment = step.segments[i];
            for (int64_t part = segment.first_part; part < segment.first_part + segment.num_parts; part++)
                num_products += (segment.stop - segment.start) * step.pools[group].parts[part].num_rows;
        }
        if (num_products > std::numeric_limits<int>::max()) refuse("%ld products with rows of A", num_products);
    }
}

// How many tensors a base has: embed, the layers', final_norm and lm_head.
int64_t num_tensors(const BaseSizes& sizes) { return 3 + sizes.layers * kLayerTensors; }

void check_group(const BaseSizes& sizes, const TrainGroup& lora, int group, int64_t num_gradients) {
    if (lora.rows < 0 || lora.rows % kRowUnit) refuse("%ld rows: they come in units of %d", lora.rows, kRowUnit);
    for (int64_t i = 0; i < lora.num_modules; i++) {
        const TrainModule& module = lora.modules[i];
        if (!is_within(module.row, module.rank, lora.rows) || module.row % kRowUnit || module.rank % kRowUnit)
            refuse("module %ld has %ld rows from %ld on, of %ld: they come in units of %d", i, module.rank, module.row,
                   lora.rows, kRowUnit);
        if (!is_within(module.out_start, module.out_features, out_features(sizes, group)) || module.out_start % kTile ||
            module.out_features % kTile)
            refuse("module %ld has %ld outputs from %ld on, of %ld", i, module.out_features, module.out_start,
                   out_features(sizes, group));
        if (module.trained < 1 || module.repeats < 1 || module.repeats > 2 ||
            module.trained > module.rank / module.repeats)
            refuse("module %ld trains %ld times %ld of its %ld rows", i, module.repeats, module.trained, module.rank);
        if (!is_within(module.a_start, module.trained * in_features(sizes, group), num_gradients) ||
            !is_within(module.b_start, module.trained * module.out_features, num_gradients))
            refuse("module %ld has gradients from %ld and %ld on, of %ld", i, module.a_start, module.b_start,
                   num_gradients);
    }
}

}  // namespace

void check_sizes(const BaseSizes& sizes) {
    for (int64_t size : {sizes.vocab, sizes.hidden, sizes.intermediate, sizes.head_dim})
        if (size < 1 || size % kTile) refuse("sizes of the base must be multiples of %d, not %ld", kTile, size);
    const int64_t group = sizes.kv_heads < 1 ? 0 : sizes.heads / sizes.kv_heads;
    if (group < 1 || group > kMaxGroup || sizes.heads % sizes.kv_heads)
        refuse("%ld query heads and %ld kv heads", sizes.heads, sizes.kv_heads);
    if (sizes.layers < 1 || sizes.max_positions < 1 || sizes.threads < 1)
        refuse("%ld layers, %ld positions, %ld threads", sizes.layers, sizes.max_positions, sizes.threads);
}

void check_ids(const BaseSizes& sizes, const int64_t* ids, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= sizes.vocab)
            refuse("token id %ld is not one of the vocabulary of %ld", ids[i], sizes.vocab);
}

void check_step(const BaseSizes& sizes, const ServeStep& step) {
    if (step.num_threads < 0 || step.num_threads > sizes.threads) refuse("a step of %ld threads", step.num_threads);
    if (step.num_tokens < 1 || step.num_tokens > kMaxTokens) refuse("a step of %ld tokens", step.num_tokens);
    check_ids(sizes, step.token_ids, step.num_tokens);
    check_runs(sizes, step);
    check_lora(sizes, step);
}

void check_sampling(const BaseSizes& sizes, const SampleStep& step) {
    if (step.num_rows < 0 || step.num_rows > kMaxTokens) refuse("%ld rows", step.num_rows);
    if (step.max_top < 0 || step.max_top > sizes.vocab) refuse("%ld likeliest tokens", step.max_top);
    if (step.num_rows && (step.hidden == nullptr) == (step.logits == nullptr)) refuse("either hidden states or logits");
    check_ids(sizes, step.seen, step.num_seen);
    check_ids(sizes, step.added_ids, step.num_added);
    for (int64_t i = 0; i < step.num_rows; i++) {
        const SampleRow& row = step.rows[i];
        if (!(row.temperature >= 0 && row.top_p >= 0 && row.min_p >= 0) || row.top_k < 0)
            refuse("row %ld has the temperature %g, top-k %ld, top-p %g and min-p %g", i, row.temperature, row.top_k,
                   row.top_p, row.min_p);
        if (row.num_top < 0 || row.num_top > step.max_top)
            refuse("row %ld wants %ld likeliest tokens of %ld", i, row.num_top, step.max_top);
        if (!is_within(row.first_seen, row.num_seen, step.num_seen))
            refuse("row %ld has seen %ld tokens from %ld on, of %ld", i, row.num_seen, row.first_seen, step.num_seen);
        if (!is_within(row.first_added, row.num_added, step.num_added))
            refuse("row %ld adds %ld numbers from %ld on, of %ld", i, row.num_added, row.first_added, step.num_added);
    }
}

void check_batch(const BaseSizes& sizes, const TrainBatch& batch) {
    if (batch.num_texts < 1 || batch.starts[0] != 0 || batch.starts[batch.num_texts] != batch.num_tokens)
        refuse("texts of %ld tokens in all: %ld were given", batch.num_texts < 1 ? 0 : batch.starts[batch.num_texts],
               batch.num_tokens);
    for (int64_t i = 0; i < batch.num_texts; i++) {
        const int64_t start = batch.starts[i], stop = batch.starts[i + 1];  // no start is below 0
        if (stop <= start || stop - start > sizes.max_positions)
            refuse("texts of 1 to %ld tokens, not from %ld to %ld", sizes.max_positions, start, stop);
    }
    if (batch.num_tokens > kMaxTokens) refuse("texts of %ld tokens in all", batch.num_tokens);
    check_ids(sizes, batch.token_ids, batch.num_tokens);
    if (batch.num_dropped < 0 || batch.num_dropped >= kDropoutShares)
        refuse("%ld of %d features are dropped", batch.num_dropped, kDropoutShares);
    for (int64_t i = 0; batch.d_weights != nullptr && i < num_tensors(sizes); i++)
        if (batch.d_weights[i] == nullptr) refuse("tensor %ld has no gradient", i);
    for (int64_t i = 0; i < sizes.layers * kGroups; i++)
        check_group(sizes, batch.lora[i], static_cast<int>(i % kGroups), batch.num_gradients);
}
