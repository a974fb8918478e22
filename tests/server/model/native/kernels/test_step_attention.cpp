#include "serving/step_attention.h"

#include <set>

#include "tiny_base.h"

TEST(attention_is_shared_out) {
    for (int threads : {1, 2, 3, 4, 5, 8, 64})
        for (int tiles : {1, 2, 4})
            for (int items = 1; items < 12 * threads; items++) {
                AttentionSplit split;
                split.plan(items, kSplitFrom - 1, tiles, threads);
                expect(split.num_split() == 0 && split.num_mixed() == items, "a short context is split");
                split.plan(items, kSplitFrom, tiles, threads);
                const int rest = items < kFewItems * threads ? items % threads : 0;
                expect(split.num_split() == rest, "%d of %d items are split", split.num_split(), items);
                std::set<std::pair<int, int>> expected, found;
                for (int item = 0; item < rest; item++)
                    for (int part = 0; part < threads; part++) expected.emplace(item, part);
                for (int i = 0; i < split.num_scored(); i++) found.emplace(split.scored(i).item, split.scored(i).part);
                expect(found == expected && (int)found.size() == split.num_scored(), "each part of scores once");
                expected.clear(), found.clear();
                for (int item = 0; item < items; item++)
                    for (int tile = 0; tile < (item < rest ? tiles : 1); tile++)
                        expected.emplace(item, item < rest ? tile : -1);
                for (int i = 0; i < split.num_mixed(); i++) found.emplace(split.mixed(i).item, split.mixed(i).part);
                expect(found == expected && (int)found.size() == split.num_mixed(), "each item once");
                for (int thread = 0; rest > 0 && thread < threads; thread++) {  // of its own as team.h has them
                    const int begin = split.num_mixed() * thread / threads;
                    const int end = split.num_mixed() * (thread + 1) / threads;
                    for (int i = begin; i < end; i++)
                        expect((split.mixed(i).part < 0) == (i - begin < items / threads), "whole items come first");
                }
            }
}

TEST(long_contexts_by_any_number_of_threads) {
    Random random(4);
    const TinyBase base(random, 2, kSplitFrom + 128, 64);
    const std::vector<int64_t> lengths = {kSplitFrom + 90, kSplitFrom + 7, 60};
    Step step(base, 3, base.sizes.max_positions);
    for (int i = 0; i < 3; i++) step.add(i, 0, lengths[i], 1);
    const auto forward = [&](int threads) {
        const Native native = Native::serving(base, threads);
        expect(native.status == kOk, "it can't be created");
        const ServeStep tables = step.tables();
        SUCCEED(smolora_forward, native.object.get(), &tables);
        return step.hidden;
    };
    forward(1);
    const auto decoded = [&](int threads, std::vector<int> sequences) {
        step.clear();
        for (int i : sequences) step.add(i, lengths[i], lengths[i] + 2);
        return forward(threads);
    };
    const std::vector<bf16> found = decoded(1, {0, 1, 2});
    for (bf16 of : found) expect(std::isfinite(to_float(of)), "%g", to_float(of));
    for (int threads : {2, 3, 4, 5, 7, 16})
        expect(decoded(threads, {0, 1, 2}) == found, "%d threads change something", threads);
    const std::vector<bf16> first(found.begin(), found.begin() + 2 * base.sizes.hidden);
    for (int threads : {1, 2, 3, 5}) expect(decoded(threads, {0}) == first, "%d threads, alone", threads);
}
