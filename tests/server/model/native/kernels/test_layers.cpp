#include "kernels/layers.h"

#include "check.h"

namespace {

constexpr double kEps = 1e-5;
const int kSizes[] = {16, 32, 48, 96, 576};

double exact_inverse_rms(const std::vector<float>& x) {
    double sum = 0;
    for (float of : x) sum += (double)of * of;
    return 1 / std::sqrt(sum / (double)x.size() + kEps);
}
// A sum of lanes, a division, an addition, a root and a division.
double rms_error(size_t size) { return sum_error((double)size / 16 + 4) + 5 * kU32; }

}  // namespace

TEST(rms_norm_of_a_row) {
    Random random(1);
    for (int size : kSizes)
        for (double scale : {1e-3, 1.0, 1e3}) {
            const auto x = random_floats(random, size, scale);
            const auto weight = random_bf16(random, size, 3);
            const double inverse = exact_inverse_rms(x);
            expect_near(inverse_rms(x.data(), size, kEps), inverse, inverse * rms_error(size), "of %d", size);
            Fenced<bf16> y(size);
            const float found = rms_norm(x.data(), weight.data(), size, kEps, y.data());
            expect(found == inverse_rms(x.data(), size, kEps), "it says another root mean square");
            y.check("rms_norm");
            for (int i = 0; i < size; i++) {
                const double exact = x[i] * inverse * to_float(weight[i]);
                expect_near(to_float(y[i]), exact, std::abs(exact) * (kU16 * 1.01 + rms_error(size)), "%d of %d", i,
                            size);
            }
        }
}

TEST(rms_norm_backward_of_a_row) {
    Random random(2);
    for (int size : kSizes) {
        const auto x = random_floats(random, size, 2), given = random_floats(random, size);
        const auto before = random_floats(random, size);
        const auto weight = random_bf16(random, size, 3);
        Fenced<float> d_x(size);
        std::copy(before.begin(), before.end(), d_x.data());
        rms_norm_backward(x.data(), inverse_rms(x.data(), size, kEps), weight.data(), size, given.data(), d_x.data());
        d_x.check("rms_norm_backward");
        const double inverse = exact_inverse_rms(x);
        double mean = 0, magnitude = 0;
        for (int i = 0; i < size; i++) {
            const double product = (double)given[i] * to_float(weight[i]) * x[i] * inverse;
            mean += product / size, magnitude += std::abs(product) / size;
        }
        for (int i = 0; i < size; i++) {
            const double g = (double)given[i] * to_float(weight[i]), n = x[i] * inverse;
            const double exact = before[i] + (g - n * mean) * inverse;
            const double error = (std::abs(g) + std::abs(n) * magnitude) * inverse * (3 * rms_error(size) + 8 * kU32);
            expect_near(d_x[i], exact, error + 2 * kU32 * std::abs(exact), "%d of %d", i, size);
        }
    }
}

TEST(rms_norm_backward_is_its_slope) {
    Random random(3);
    const int size = 48;
    const auto x = random_floats(random, size), given = random_floats(random, size);
    const auto weight = random_bf16(random, size);
    auto value = [&](int changed, double by) {  // Σ given · y in doubles
        std::vector<double> moved(x.begin(), x.end());
        moved[changed] += by;
        double sum = 0, of = 0;
        for (double each : moved) sum += each * each;
        for (int i = 0; i < size; i++) of += given[i] * moved[i] * to_float(weight[i]);
        return of / std::sqrt(sum / size + kEps);
    };
    std::vector<float> d_x(size);
    rms_norm_backward(x.data(), inverse_rms(x.data(), size, kEps), weight.data(), size, given.data(), d_x.data());
    for (int i = 0; i < size; i++)
        expect_near(d_x[i], (value(i, 1e-4) - value(i, -1e-4)) / 2e-4, 1e-5, "the slope in x's %d", i);
}

TEST(gradients_of_norms_and_embeddings_are_added) {
    Random random(7);
    const int tokens = 37, size = 96, vocab = 5;
    const auto x = random_floats(random, (size_t)tokens * size, 2), dy = random_floats(random, (size_t)tokens * size);
    std::vector<float> inverse;
    std::vector<int64_t> ids;
    for (int t = 0; t < tokens; t++) {
        inverse.push_back(inverse_rms(&x[t * size], size, kEps));
        ids.push_back(random.below(vocab));
    }
    Fenced<float> d_weight(size, 0.5f), d_embed((size_t)vocab * size, 0.5f);
    for (int column = 0; column < size; column += kTile) {
        add_norm_gradient(x.data(), inverse.data(), dy.data(), tokens, size, column, d_weight.data());
        add_embedding_gradient(dy.data(), ids.data(), tokens, size, column, d_embed.data());
    }
    d_weight.check("add_norm_gradient"), d_embed.check("add_embedding_gradient");
    for (int i = 0; i < size; i++) {
        double of_norm = 0.5, magnitude = 0.5;
        std::vector<double> of_tokens(vocab, 0.5);
        for (int t = 0; t < tokens; t++) {
            const double share = (double)dy[t * size + i] * x[t * size + i] * inverse[t];
            of_norm += share, magnitude += std::abs(share);
            of_tokens[ids[t]] += dy[t * size + i];
        }
        expect_near(d_weight[i], of_norm, (tokens + 2) * kU32 * magnitude, "the norm's %d", i);
        for (int id = 0; id < vocab; id++)
            expect_near(d_embed[id * size + i], of_tokens[id], tokens * tokens * kU32, "token %d's %d", id, i);
    }
}

TEST(rotate_there_and_back) {
    Random random(4);
    const int positions = 7;
    for (int dim : {32, 64, 96, 128}) {
        // As rotary_table makes it: cos of both halves; sin, whose first half is negated.
        std::vector<float> table((size_t)2 * positions * dim);
        for (int position = 0; position < positions; position++)
            for (int i = 0; i < dim; i++) {
                const double angle = position * std::pow(10000.0, -2.0 * (i % (dim / 2)) / dim);
                table[position * dim + i] = (float)std::cos(angle);
                table[(positions + position) * dim + i] = (float)(i < dim / 2 ? -std::sin(angle) : std::sin(angle));
            }
        for (int position = 0; position < positions; position++)
            for (bool back : {false, true}) {
                const auto given = random_floats(random, dim);
                Fenced<float> values(dim);
                std::copy(given.begin(), given.end(), values.data());
                rotate(values.data(), table.data(), positions, dim, position, back);
                values.check("rotate");
                for (int i = 0; i < dim / 2; i++) {
                    const double angle = (back ? -1 : 1) * position * std::pow(10000.0, -2.0 * i / dim);
                    const double a = given[i], b = given[i + dim / 2], bound = 4 * kU32 * (std::abs(a) + std::abs(b));
                    expect_near(values[i], a * std::cos(angle) - b * std::sin(angle), bound, "dim %d, position %d: %d",
                                dim, position, i);
                    expect_near(values[i + dim / 2], b * std::cos(angle) + a * std::sin(angle), bound,
                                "dim %d, position %d: %d of the second half", dim, position, i);
                }
            }
    }
}

TEST(sum_of_rows) {
    Random random(5);
    for (int size : {16, 64, 96})
        for (int count : {1, 2, 3, 8}) {
            const int stride = size + 16;
            const auto x = random_floats(random, (size_t)stride * count);
            Fenced<float> sum(size);
            sum_rows(x.data(), stride, size, count, sum.data());
            sum.check("sum_rows");
            for (int i = 0; i < size; i++) {
                double exact = 0, magnitude = 0;
                for (int row = 0; row < count; row++) {
                    exact += x[row * stride + i], magnitude += std::abs(x[row * stride + i]);
                }
                expect_near(sum[i], exact, sum_error(count) * magnitude, "%d of %d rows", i, count);
            }
        }
}

TEST(rounded_to_bf16) {
    Random random(6);
    for (int count : {16, 32, 112}) {
        const auto x = random_floats(random, count);
        Fenced<bf16> y(count);
        round_to_bf16(x.data(), count, y.data());
        y.check("round_to_bf16");
        for (int i = 0; i < count; i++) expect(y[i] == to_bf16(x[i]), "%d of %d", i, count);
    }
}

TEST(swiglu_and_its_gradient) {
    Random random(7);
    for (int size : {16, 32, 96}) {
        const auto gate = random_bf16(random, size, 6), up = random_bf16(random, size, 2);
        const auto dy = random_floats(random, size);
        Fenced<bf16> y(size), again(size), d_gate(size), d_up(size);
        swiglu(gate.data(), up.data(), size, y.data());
        swiglu_backward(gate.data(), up.data(), dy.data(), size, d_gate.data(), d_up.data(), again.data());
        y.check("swiglu"), again.check("swiglu again"), d_gate.check("d_gate"), d_up.check("d_up");
        for (int i = 0; i < size; i++) {
            expect(again[i] == y[i], "%d is another one in the backward pass", i);
            const double g = to_float(gate[i]), u = to_float(up[i]), share = 1 / (1 + std::exp(-g));
            const double error = 1.01 * kU16 + kExp + 8 * kU32;
            expect_near(to_float(y[i]), g * share * u, std::abs(g * share * u) * error, "y's %d", i);
            expect_near(to_float(d_up[i]), dy[i] * g * share, std::abs(dy[i] * g * share) * error, "d_up's %d", i);
            // Two terms that may cancel; each is as exact as above.
            const double terms = std::abs(dy[i] * u) * (share + std::abs(g) * share * (1 - share));
            const double exact = dy[i] * u * (share + g * share * (1 - share));
            expect_near(to_float(d_gate[i]), exact, 1.01 * kU16 * std::abs(exact) + 4 * (kExp + 8 * kU32) * terms,
                        "d_gate's %d", i);
        }
    }
}
