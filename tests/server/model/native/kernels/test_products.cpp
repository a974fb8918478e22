#include "kernels/products.h"

#include "check.h"

namespace {

// A group of three modules over one input; the second has no rows of its own.
struct SomeGroup {
    int64_t in, out;
    std::vector<TrainModule> modules;
    std::vector<bf16> w, a, b;
    TrainGroup lora{};

    SomeGroup(Random& random, int64_t in, const std::vector<int64_t>& ranks, const std::vector<int64_t>& outs)
        : in(in) {
        int64_t row = 0, column = 0;
        for (size_t i = 0; i < ranks.size(); i++) {
            if (ranks[i]) modules.push_back({row, ranks[i], column, outs[i], ranks[i], 1, 0, 0, 1});
            row += ranks[i], column += outs[i];
        }
        out = column;
        w = random_bf16(random, (size_t)(out * in)), a = random_bf16(random, (size_t)(row * in));
        b.resize((size_t)(row * out));  // zero outside the features of each module's rows
        for (const TrainModule& module : modules)
            for (int64_t r = module.row; r < module.row + module.rank; r++)
                for (int64_t c = module.out_start; c < module.out_start + module.out_features; c++)
                    b[r * out + c] = to_bf16((float)random.uniform(-1, 1));
        lora = {a.data(), b.data(), row, modules.data(), (int64_t)modules.size()};
    }
};

struct Sum {
    double value = 0, size = 0, count = 0;
    void add(double x, double y) { value += x * y, size += std::abs(x * y), count++; }
    double error() const { return sum_error(count + 2) * size; }
};

const std::vector<int64_t> kRanks = {16, 0, 48}, kOuts = {64, 32, 96};

}  // namespace

TEST(module_at_a_column) {
    Random random(1);
    const SomeGroup group(random, 32, kRanks, kOuts);
    for (int64_t column = 0; column < group.out; column += kTile) {
        const TrainModule* module = module_at(group.lora, column);
        const TrainModule* expected = column < 64 ? &group.modules[0] : column < 96 ? nullptr : &group.modules[1];
        expect(module == expected, "at %ld", column);
    }
}

TEST(shrink_and_back) {
    Random random(3);
    for (int64_t in : {32, 96})
        for (int start : {0, 2})
            for (int rows : {1, 13, 16, 17}) {
                const SomeGroup group(random, in, kRanks, kOuts);
                const int tokens = start + rows + 1;
                const auto x = random_bf16(random, (size_t)(tokens * in));
                const auto dy = random_bf16(random, (size_t)(tokens * group.out));
                ProductScratch scratch;
                Fenced<bf16> hidden((size_t)(tokens * group.lora.rows)), back((size_t)(tokens * group.lora.rows));
                shrink(group.lora, x.data(), in, start, rows, hidden.data(), scratch);
                shrink_backward(group.lora, dy.data(), group.out, start, rows, back.data(), scratch);
                hidden.check("shrink"), back.check("shrink_backward");
                for (int64_t i = 0; i < tokens * group.lora.rows; i++) {
                    const int64_t token = i / group.lora.rows, row = i % group.lora.rows;
                    if (token < start || token >= start + rows) {
                        expect(hidden[i] == 77 && back[i] == 77, "token %ld is written", token);
                        continue;
                    }
                    Sum forward, backward;
                    for (int64_t k = 0; k < in; k++)
                        forward.add(to_float(x[token * in + k]), to_float(group.a[row * in + k]));
                    for (int64_t k = 0; k < group.out; k++)
                        backward.add(to_float(dy[token * group.out + k]), to_float(group.b[row * group.out + k]));
                    for (auto [found, exact] : {std::pair{hidden[i], forward}, std::pair{back[i], backward}})
                        expect_near(to_float(found), exact.value, exact.error() + 1.01 * kU16 * std::abs(exact.value),
                                    "token %ld, row %ld", token, row);
                }
            }
}

TEST(product_and_back) {
    Random random(4);
    for (int64_t in : {32, 64})
        for (int start : {0, 3})
            for (int rows : {1, 12, 17}) {
                const SomeGroup group(random, in, kRanks, kOuts);
                const int tokens = start + rows + 1;
                const auto x = random_bf16(random, (size_t)(tokens * in));
                const auto dy = random_bf16(random, (size_t)(tokens * group.out));
                const auto hidden = random_bf16(random, (size_t)(tokens * group.lora.rows));
                std::vector<uint16_t> kept(x.size() / 16);
                for (auto& of : kept) of = (uint16_t)random.next();
                ProductScratch scratch;
                const int y_stride = kTile + 7;
                for (int64_t column = 0; column < group.out; column += kTile) {
                    Fenced<float> y((size_t)(rows * y_stride));
                    product(group.w.data(), in, group.out, group.lora, x.data(), hidden.data(), column, start, rows,
                            y.data(), y_stride, scratch);
                    y.check("product");
                    for (int row = 0; row < rows; row++)
                        for (int i = 0; i < y_stride; i++) {
                            Sum exact;
                            for (int64_t k = 0; i < kTile && k < in; k++)
                                exact.add(to_float(x[(start + row) * in + k]),
                                          to_float(group.w[(column + i) * in + k]));
                            for (int64_t k = 0; i < kTile && k < group.lora.rows; k++)
                                exact.add(to_float(hidden[(start + row) * group.lora.rows + k]),
                                          to_float(group.b[k * group.out + column + i]));
                            expect_near(y[row * y_stride + i], i < kTile ? exact.value : 77, exact.error(),
                                        "row %d, output %ld", row, column + i);
                        }
                }
                for (bool has_dropout : {false, true})
                    for (int64_t column = 0; column < in; column += kTile) {
                        Fenced<float> y((size_t)(rows * y_stride));
                        product_backward(group.w.data(), in, group.out, group.lora, has_dropout ? kept.data() : nullptr,
                                         1.25, dy.data(), hidden.data(), column, start, rows, y.data(), y_stride,
                                         scratch);
                        y.check("product_backward");
                        for (int row = 0; row < rows; row++)
                            for (int i = 0; i < y_stride; i++) {
                                const int64_t token = start + row;
                                Sum exact;
                                for (int64_t k = 0; i < kTile && k < group.out; k++)
                                    exact.add(to_float(dy[token * group.out + k]),
                                              to_float(group.w[k * in + column + i]));
                                const int64_t at = token * in + column + i;
                                const bool is_kept = i < kTile && kept[at / 16] >> at % 16 & 1;
                                const double by = !has_dropout ? 1 : is_kept ? 1.25 : 0;
                                for (int64_t k = 0; i < kTile && k < group.lora.rows; k++)
                                    exact.add(by * to_float(hidden[token * group.lora.rows + k]),
                                              to_float(group.a[k * in + column + i]));
                                expect_near(y[row * y_stride + i], i < kTile ? exact.value : 77, exact.error(),
                                            "dropout %d: row %d, feature %ld", has_dropout, row, column + i);
                            }
                    }
            }
}

TEST(a_group_without_rows) {
    Random random(5);
    const SomeGroup group(random, 64, {}, {});
    const auto w = random_bf16(random, 64 * 32), dy = random_bf16(random, 3 * 32);
    ProductScratch scratch;
    Fenced<float> y(3 * kTile);
    product_backward(w.data(), 64, 32, group.lora, nullptr, 1, dy.data(), nullptr, 32, 0, 3, y.data(), kTile, scratch);
    for (int row = 0; row < 3; row++)
        for (int i = 0; i < kTile; i++) {
            Sum exact;
            for (int k = 0; k < 32; k++) exact.add(to_float(dy[row * 32 + k]), to_float(w[k * 64 + 32 + i]));
            expect_near(y[row * kTile + i], exact.value, exact.error(), "row %d, feature %d", row, i);
        }
}

TEST(sums_over_tokens) {
    Random random(6);
    for (int tokens : {1, 2, 15, 16, 17, 33, 100}) {
        const int outputs = tokens % 2 ? 16 : 48, out = 64, across = (tokens + 31) / 32 * 32, y_stride = 96;
        auto x = random_bf16(random, (size_t)tokens * outputs);  // (tokens, outputs), and turned over
        std::vector<bf16> x_T((size_t)outputs * across);
        transpose(x.data(), outputs, tokens, outputs, x_T.data(), across);
        const auto dy = random_bf16(random, (size_t)tokens * out);
        ProductScratch scratch;
        for (int column = 0; column < out; column += kTile) {
            Fenced<float> y((size_t)outputs * y_stride);
            multiply_over_tokens({x_T.data(), (size_t)across}, outputs, dy.data(), out, column, tokens, y.data(),
                                 y_stride, scratch);
            y.check("multiply_over_tokens");
            Fenced<float> added((size_t)outputs * y_stride, 2);
            multiply_over_tokens<true>({x_T.data(), (size_t)across}, outputs, dy.data(), out, column, tokens,
                                       added.data(), y_stride, scratch);
            added.check("multiply_over_tokens");
            Fenced<float> turned((size_t)kTile * y_stride);
            multiply_over_tokens_turned(x_T.data(), across, outputs, dy.data(), out, column, tokens, turned.data(),
                                        y_stride, scratch);
            turned.check("multiply_over_tokens_turned");
            for (int output = 0; output < outputs; output++)
                for (int i = 0; i < kTile; i++) {
                    Sum exact;
                    for (int token = 0; token < tokens; token++)
                        exact.add(to_float(x[token * outputs + output]), to_float(dy[token * out + column + i]));
                    expect_near(y[output * y_stride + i], exact.value, exact.error(), "%d tokens: (%d, %d)", tokens,
                                output, column + i);
                    expect(turned[i * y_stride + output] == y[output * y_stride + i], "(%d, %d) turned", output, i);
                    exact.add(2, 1);
                    expect_near(added[output * y_stride + i], exact.value, exact.error(), "%d tokens added: (%d, %d)",
                                tokens, output, column + i);
                }
        }
    }
}
