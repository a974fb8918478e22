#include "kernels/step_attention.h"

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
    // The first has an odd number of pieces of 16, the second is the longest, the third is split with them if at all.
    const std::vector<int64_t> lengths = {kSplitFrom + 7, kSplitFrom + 90, 60};
    Step step(base, 3, base.sizes.max_positions);
    for (int i = 0; i < 3; i++) step.add(i, 0, lengths[i], 1);
    const auto forward = [&](int threads) {
        const Native native = Native::serving(base, threads);
        expect(native.status == kOk, "it can't be created");
        const ServeStep tables = step.tables();
        SUCCEED(smolora_forward, native.object.get(), &tables);
        for (bf16 of : step.hidden) expect(std::isfinite(to_float(of)), "%g", to_float(of));
        return step.hidden;
    };
    const std::vector<bf16> prompts = forward(1);
    for (int threads : {2, 4, 5}) expect(forward(threads) == prompts, "%d threads, prompts", threads);
    // Two tokens each, of which so many are wanted: of one alone the last layer has other queries than those before.
    const auto decoded = [&](int threads, std::vector<int> sequences, int64_t wanted) {
        AttentionSplit split;
        const int items = (int)(sequences.size() * base.sizes.kv_heads);
        split.plan(items, (int)lengths[sequences[0]], 2, threads);
        expect(split.num_split() == items % threads, "nothing is split");
        step.clear();
        for (int i : sequences) step.add(i, lengths[i], lengths[i] + 2, wanted);
        return forward(threads);
    };
    for (int64_t wanted : {1, 2}) {
        const std::vector<bf16> found = decoded(1, {0, 1, 2}, wanted);
        for (int threads : {2, 3, 4, 5, 7, 16})
            expect(decoded(threads, {0, 1, 2}, wanted) == found, "%d threads change something", threads);
        const std::vector<bf16> first = decoded(1, {0}, wanted);
        expect(std::equal(first.begin(), first.begin() + wanted * base.sizes.hidden, found.begin()), "company does");
        for (int threads : {3, 5}) expect(decoded(threads, {0}, wanted) == first, "%d threads, alone", threads);
    }
}
