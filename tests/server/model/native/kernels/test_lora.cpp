#include "kernels/lora/group.h"

#include "check.h"

namespace {

constexpr int kIn = 96, kColumns = 128, kLayers = 2;  // features of a group: 64 of one module, 32 of two more

struct Sizes {  // of a module
    int out_start, out_features;
};
constexpr Sizes kModules[] = {{0, 64}, {64, 32}, {96, 32}};

// Adapters one after the other in a pool, each with its ranks by module (0: without it).
struct Pool {
    std::vector<bf16> a, b;
    std::vector<LoraPart> adapters;
    std::vector<LoraModule> modules;
    std::vector<LoraPart> parts;
    LoraPool pool;

    Pool(Random& random, const std::vector<std::vector<int>>& ranks) {
        int64_t row = 3, offset = 64;  // others' before
        for (const auto& of : ranks) {
            LoraPart part{row, 0, (int64_t)modules.size(), 0, offset, 0};
            for (int i = 0; i < 3; i++) {
                if (of[i] == 0) continue;
                modules.push_back({of[i], part.num_rows, part.b_size, kModules[i].out_start, kModules[i].out_features});
                part.num_rows += of[i], part.num_modules++, part.b_size += of[i] * kModules[i].out_features;
            }
            adapters.push_back(part);
            row += part.num_rows, offset += part.b_size;
        }
        a = random_bf16(random, (size_t)kLayers * row * kIn), b = random_bf16(random, (size_t)kLayers * offset);
        pool = {a.data(), b.data(), kLayers, row, offset, kIn, nullptr};
    }
    // Of a part: its row's number k of A, and its module's number (output, row) of B.
    double a_at(int layer, const LoraPart& part, int64_t row, int k) const {
        const bf16* run = &a[(part.first_row * kLayers + layer * part.num_rows) * kIn];
        return to_float(run[(k / 2 * part.num_rows + row) * 2 + k % 2]);
    }
    double b_at(int layer, const LoraPart& part, const LoraModule& module, int64_t output, int64_t row) const {
        const bf16* of = &b[part.b_offset * kLayers + layer * part.b_size + module.offset];
        return to_float(of[((output / kTile * (module.rank / 2) + row / 2) * kTile + output % kTile) * 2 + row % 2]);
    }
    void use(const std::vector<int>& indices) {
        for (int index : indices) parts.push_back(adapters[index]);
        pool.parts = parts.data();
    }
};

}  // namespace

// What the adapters of segments add, for all tokens at once: `hidden` and `y` hold it to sums in doubles.
TEST(lora_of_segments) {
    Random random(1);
    Pool pool(random, {{8, 8, 8}, {4, 0, 2}, {0, 0, 0}, {18, 16, 2}, {0, 10, 0}, {64, 34, 0}});
    // Tokens without adapters, one adapter, a blend, one that has nothing in this group, another blend, many tokens.
    pool.use({0, 1, 3, 0, 2, 4, 1, 5, 3});
    const std::vector<double> weights = {1, 0.5, -0.7, 1.5, 1, 2, -0.25, 1, 0.3};
    const std::vector<LoraSegment> segments = {{1, 3, 0, 1}, {3, 4, 1, 3}, {6, 8, 4, 1}, {8, 21, 5, 2}, {21, 60, 7, 2}};
    const int tokens = 62;
    const auto x = random_bf16(random, tokens * kIn);
    LoraGroup group;
    group.plan(pool.pool, pool.modules.data(), segments.data(), (int)segments.size(), weights.data());
    for (int layer = 0; layer < kLayers; layer++) {
        for (int task = group.num_tasks() - 1; task >= 0; task--) group.shrink(layer, task, x.data());
        for (int column = 0; column < kColumns; column += kTile) {
            constexpr int kStride = kTile + 5;
            const auto before = random_floats(random, tokens * kStride);
            Fenced<float> y(before.size());
            std::copy(before.begin(), before.end(), y.data());
            group.expand(layer, 0, tokens, column, y.data(), kStride);
            y.check("expand");
            for (int token = 0; token < tokens; token++) {
                for (int i = kTile; i < kStride; i++)
                    expect(y[token * kStride + i] == before[token * kStride + i], "column %d is written", i);
                for (int i = 0; i < kTile; i++) {
                    const float found = y[token * kStride + i], was = before[token * kStride + i];
                    double exact = was, bound = 0, size = std::abs(exact);
                    int count = 1;
                    for (const LoraSegment& segment : segments) {
                        if (token < segment.start || token >= segment.stop) continue;
                        for (int64_t p = segment.first_part; p < segment.first_part + segment.num_parts; p++) {
                            const LoraPart& part = pool.parts[p];
                            for (int64_t m = part.first_module; m < part.first_module + part.num_modules; m++) {
                                const LoraModule& module = pool.modules[m];
                                const int64_t output = column + i - module.out_start;
                                if (output < 0 || output >= module.out_features) continue;
                                for (int64_t row = 0; row < module.rank; row++) {
                                    double hidden = 0, magnitude = 0;
                                    for (int k = 0; k < kIn; k++) {
                                        const double product =
                                            pool.a_at(layer, part, module.row + row, k) * to_float(x[token * kIn + k]);
                                        hidden += product, magnitude += std::abs(product);
                                    }
                                    const double weight = weights[p] * pool.b_at(layer, part, module, output, row);
                                    const double error = sum_error(kIn + 2) * magnitude;
                                    exact += weight * hidden, size += std::abs(weight * hidden);
                                    bound += std::abs(weight) * (error + kU16 * (std::abs(hidden) + error));
                                    count++;
                                }
                            }
                        }
                    }
                    if (count == 1) expect(found == was, "token %d has nothing at %d", token, column + i);
                    expect_near(found, exact, bound + sum_error(count) * (size + bound),
                                "layer %d, token %d, output %d", layer, token, column + i);
                }
            }
        }
    }
    group.plan(pool.pool, pool.modules.data(), nullptr, 0, nullptr);
    expect(group.num_tasks() == 0, "nobody has adapters");
    std::vector<float> y(kTile, 1);
    group.expand(0, 2, 1, 0, y.data(), kTile);
    for (float of : y) expect(of == 1, "nothing is added");
}

// A token gets the same bits alone, among few and among many that share its adapters, whichever of its neighbours are
// computed with it, and beside others whose adapters are full of NaN.
TEST(lora_of_a_token_in_any_company) {
    Random random(2);
    // Ranks of one pair, of several, and of more than the sixteen pairs that AMX takes at once.
    Pool pool(random, {{16, 16, 16}, {2, 64, 6}, {70, 34, 32}, {8, 8, 8}});
    const LoraPart& last = pool.adapters[3];
    std::fill_n(pool.a.begin() + last.first_row * kLayers * kIn, last.num_rows * kLayers * kIn, 0x7fc0);
    pool.use({0, 1, 2, 3});
    const std::vector<double> weights = {0.9, -1.5, 0.3, 1};
    const int tokens = 75;
    // Numbers of all sizes, some too small to be normal once they are multiplied.
    auto x = random_bf16(random, tokens * kIn);
    for (int i = 0; i < tokens * kIn; i++)
        if (i / kIn % 5 == 4) x[i] = to_bf16(std::ldexp(to_float(x[i]), -(int)random.below(120)));
    auto run = [&](const std::vector<LoraSegment>& segments, const bf16* input, int count, int chunk) {
        LoraGroup group;
        group.plan(pool.pool, pool.modules.data(), segments.data(), (int)segments.size(), weights.data());
        for (int task = 0; task < group.num_tasks(); task++) group.shrink(1, task, input);
        std::vector<float> y((size_t)count * kColumns);
        for (size_t i = 0; i < y.size(); i++) y[i] = std::ldexp(1.0f, -(int)(i % 50));
        for (int start = 0; start < count; start += chunk)
            for (int column = 0; column < kColumns; column += kTile)
                group.expand(1, start, std::min(chunk, count - start), column, &y[start * kColumns + column], kColumns);
        return y;
    };
    const auto together = run({{0, tokens, 0, 3}}, x.data(), tokens, tokens);
    for (int chunk : {1, 2, 7, 9, 33, 48})
        expect(run({{0, tokens, 0, 3}}, x.data(), tokens, chunk) == together, "chunks of %d change something", chunk);
    for (int size : {1, 2, 8, 9, 16, 17, 40}) {
        std::vector<LoraSegment> segments;
        for (int start = 0; start < tokens; start += size)
            segments.push_back({start, std::min(start + size, tokens), 0, 3});
        expect(run(segments, x.data(), tokens, 48) == together, "segments of %d tokens change something", size);
    }
    const auto beside = run({{0, 20, 3, 1}, {20, 55, 0, 3}, {55, tokens, 3, 1}}, x.data(), tokens, tokens);
    expect(std::equal(beside.begin() + 20 * kColumns, beside.begin() + 55 * kColumns, together.begin() + 20 * kColumns),
           "others' NaN changes something");
    for (int token : {0, 31, 74}) {
        // The first term alone makes numbers of all sizes: `y` differs by the token's place, so it is set to one
        // place's.
        const auto alone = run({{0, 1, 0, 3}}, &x[token * kIn], 1, 1);
        LoraGroup group;
        const LoraSegment all{0, tokens, 0, 3};
        group.plan(pool.pool, pool.modules.data(), &all, 1, weights.data());
        for (int task = 0; task < group.num_tasks(); task++) group.shrink(1, task, x.data());
        for (int column = 0; column < kColumns; column += kTile) {
            std::vector<float> y((size_t)tokens * kTile);
            for (int i = 0; i < tokens * kTile; i++) y[i] = std::ldexp(1.0f, -((column + i % kTile) % 50));
            group.expand(1, 0, tokens, column, y.data(), kTile);
            expect(std::equal(&y[token * kTile], &y[token * kTile] + kTile, &alone[column]), "token %d alone", token);
        }
    }
}
