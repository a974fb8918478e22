#include "kernels/lora.h"

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
            LoraPart part{row, 0, (int64_t)modules.size(), 0};
            for (int i = 0; i < 3; i++) {
                if (of[i] == 0) continue;
                modules.push_back({of[i], part.num_rows, offset, kModules[i].out_start, kModules[i].out_features});
                part.num_rows += of[i], part.num_modules++, offset += of[i] * kModules[i].out_features;
            }
            adapters.push_back(part);
            row += part.num_rows;
        }
        a = random_bf16(random, (size_t)kLayers * row * kIn), b = random_bf16(random, (size_t)kLayers * offset);
        pool = {a.data(), b.data(), kLayers, row * kIn, offset, kIn, nullptr};
    }
    // Of a part: its row's number k of A, and its module's number (output, row) of B.
    double a_at(int layer, const LoraPart& part, int64_t row, int k) const {
        const bf16* run = &a[layer * pool.a_stride + part.first_row * kIn];
        return to_float(run[(k / 2 * part.num_rows + row) * 2 + k % 2]);
    }
    double b_at(int layer, const LoraModule& module, int64_t output, int64_t row) const {
        const bf16* of = &b[layer * pool.b_stride + module.offset];
        return to_float(of[((output / kTile * (module.rank / 2) + row / 2) * kTile + output % kTile) * 2 + row % 2]);
    }
    void use(const std::vector<int>& indices) {
        for (int index : indices) parts.push_back(adapters[index]);
        pool.parts = parts.data();
    }
};

}  // namespace

TEST(lora_of_segments) {
    Random random(1);
    Pool pool(random, {{8, 8, 8}, {3, 0, 1}, {0, 0, 0}, {17, 16, 1}, {0, 9, 0}});
    // Tokens without adapters, one adapter, a blend, one that has nothing in this group, and another blend.
    pool.use({0, 1, 3, 0, 2, 4, 1});
    const std::vector<double> weights = {1, 0.5, -0.7, 1.5, 1, 2, -0.25};
    const std::vector<LoraSegment> segments = {{1, 3, 0, 1}, {3, 4, 1, 3}, {6, 8, 4, 1}, {8, 13, 5, 2}};
    const int tokens = 14;
    const auto x = random_bf16(random, tokens * kIn);
    LoraGroup group;
    for (int layer = 0; layer < kLayers; layer++) {
        group.plan(pool.pool, pool.modules.data(), segments.data(), (int)segments.size(), weights.data(), tokens);
        for (int task = group.num_tasks() - 1; task >= 0; task--) group.shrink(layer, task, x.data());
        for (int token = 0; token < tokens; token++)
            for (int column = 0; column < kColumns; column += kTile) {
                const auto before = random_floats(random, kTile);
                Fenced<float> y(kTile);
                std::copy(before.begin(), before.end(), y.data());
                group.prefetch(layer, token, token + 1, column);
                group.expand(layer, token, column, y.data());
                y.check("expand");
                for (int i = 0; i < kTile; i++) {
                    double exact = before[i], bound = 0, size = std::abs(exact);
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
                                    const bf16* a =
                                        &pool.a[layer * pool.pool.a_stride + (part.first_row + module.row + row) * kIn];
                                    const double weight =
                                        to_float(pool.b[layer * pool.pool.b_stride + module.offset +
                                                        (output / 32 * module.rank + row) * 32 + output % 32]);
                                    double hidden = 0, magnitude = 0;
                                    for (int k = 0; k < kIn; k++) {
                                        const double product = (double)to_float(a[k]) * to_float(x[token * kIn + k]);
                                        hidden += product, magnitude += std::abs(product);
                                    }
                                    exact += weights[p] * hidden * weight;
                                    bound += std::abs(weights[p] * weight) * magnitude * (sum_error(kIn / 16 + 8));
                                    size += std::abs(weights[p] * weight * hidden);
                                    count++;
                                }
                            }
                        }
                    }
                    if (count == 1) expect(y[i] == before[i], "token %d has nothing at %d", token, column + i);
                    expect_near(y[i], exact, bound + sum_error(count) * (size + bound), "layer %d, token %d, output %d",
                                layer, token, column + i);
                }
            }
    }
    group.plan(pool.pool, pool.modules.data(), nullptr, 0, nullptr, 3);
    expect(group.num_tasks() == 0, "nobody has adapters");
    std::vector<float> y(kTile, 1);
    group.prefetch(0, 0, 3, 0), group.expand(0, 2, 0, y.data());
    for (float of : y) expect(of == 1, "nothing is added");
}
