// Checks of an entry's arguments, before they are used: native code would read and write anywhere. They throw Invalid.
#pragma once
#include "guard.h"

constexpr int64_t kMaxTokens = 1 << 20;  // in a step or a batch: items are counted by ints

void check_sizes(const BaseSizes& sizes);
void check_ids(const BaseSizes& sizes, const int64_t* ids, int64_t count);
void check_step(const BaseSizes& sizes, const ServeStep& step);
void check_sampling(const BaseSizes& sizes, const SampleStep& step);
void check_batch(const BaseSizes& sizes, const TrainBatch& batch);
