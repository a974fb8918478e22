#include "kernels/training_attention.h"

#include "check.h"
#include "exact_attention.h"

namespace {

constexpr int kHeads = 2;  // beside each other in a row

// Queries, keys and values of one head among others, and what attention makes of them in doubles.
struct ExactText {
    int length, dim, stride;
    std::vector<bf16> rows;
    std::vector<ExactWeights> weights;  // of each query

    ExactText(Random& random, int length, int dim)
        : length(length), dim(dim), stride(3 * kHeads * dim), rows(random_bf16(random, (size_t)length * stride, 2)) {
        for (int i = 0; i < length; i++) weights.emplace_back(q(i), dim, i + 1, [&](int k) { return this->k(k); });
    }
    const bf16* q(int i) const { return &rows[i * stride + dim]; }
    const bf16* k(int i) const { return &rows[i * stride + kHeads * dim]; }
    const bf16* v(int i) const { return &rows[i * stride + (2 * kHeads + 1) * dim]; }
    Text text() const { return {q(0), k(0), v(0), (size_t)stride, length, dim}; }
};

void check_forward(int length, int dim, TextScratch& scratch) {
    Random random(length * 1000 + dim);
    const ExactText exact(random, length, dim);
    const int out_stride = dim + 32;
    Fenced<bf16> out((size_t)length * out_stride);
    attend_text(exact.text(), out.data(), out_stride, scratch);
    out.check("attend_text");
    for (int i = 0; i < length; i++)
        for (int d = 0; d < out_stride; d++) {
            const float found = to_float(out[i * out_stride + d]);
            if (d >= dim) {
                expect(out[i * out_stride + d] == 77, "written beside the head");
                continue;
            }
            double sum = 0, size = 0;
            for (int k = 0; k <= i; k++) {
                const double product = exact.weights[i].p[k] * to_float(exact.v(k)[d]);
                sum += product, size += std::abs(product);
            }
            const double error = size * (kU16 + exact.weights[i].error + sum_error(i + 35));
            expect_near(found, sum, error + kU16 * (std::abs(sum) + error), "%d tokens, dim %d: (%d, %d)", length, dim,
                        i, d);
        }
}

void check_backward(int length, int dim, TextScratch& scratch) {
    Random random(length * 1000 + dim);
    const ExactText exact(random, length, dim);
    const int d_out_stride = dim + 16, stride = dim + 32;
    const auto d_out = random_bf16(random, (size_t)length * d_out_stride);
    Fenced<float> dq((size_t)length * stride), dk((size_t)length * stride), dv((size_t)length * stride);
    attend_text_backward(exact.text(), d_out.data(), d_out_stride, dq.data(), dk.data(), dv.data(), stride, scratch);
    for (auto* of : {&dq, &dk, &dv}) of->check("attend_text_backward");

    // The gradient of scores (i, k), and what the kernel's may be off by before and after it is rounded.
    const double scale = 1 / std::sqrt((double)dim);
    std::vector<double> ds((size_t)length * length), error(ds.size());
    for (int i = 0; i < length; i++) {
        std::vector<double> dp(i + 1), dp_error(i + 1);
        double mean = 0, mean_error = 0;
        for (int k = 0; k <= i; k++) {
            double size = 0;
            for (int d = 0; d < dim; d++) {
                const double product = (double)to_float(d_out[i * d_out_stride + d]) * to_float(exact.v(k)[d]);
                dp[k] += product, size += std::abs(product);
            }
            dp_error[k] = sum_error(dim) * size;
            mean += exact.weights[i].p[k] * dp[k];
            mean_error +=
                exact.weights[i].p[k] * (dp_error[k] + (exact.weights[i].error + sum_error(i + 20)) * std::abs(dp[k]));
        }
        for (int k = 0; k <= i; k++) {
            const double p = exact.weights[i].p[k];
            ds[i * length + k] = scale * p * (dp[k] - mean);
            error[i * length + k] =
                scale * p * (dp_error[k] + mean_error + (exact.weights[i].error + 6 * kU32) * std::abs(dp[k] - mean));
            error[i * length + k] += kU16 * (std::abs(ds[i * length + k]) + error[i * length + k]);
        }
    }
    const double more = sum_error(length + 34);
    for (int i = 0; i < length; i++)
        for (int d = 0; d < dim; d++) {
            double q = 0, q_error = 0, k_sum = 0, k_error = 0, v = 0, v_error = 0;
            for (int other = 0; other < length; other++) {
                const double of_q = ds[i * length + other], of_k = ds[other * length + i];
                const double key = to_float(exact.k(other)[d]), query = to_float(exact.q(other)[d]);
                q += of_q * key, q_error += (error[i * length + other] + more * std::abs(of_q)) * std::abs(key);
                k_sum += of_k * query, k_error += (error[other * length + i] + more * std::abs(of_k)) * std::abs(query);
                if (other < i) continue;
                const double product = exact.weights[other].p[i] * to_float(d_out[other * d_out_stride + d]);
                v += product, v_error += std::abs(product) * (kU16 + exact.weights[other].error + more);
            }
            expect_near(dq[i * stride + d], q, q_error, "dq of %d tokens, dim %d: (%d, %d)", length, dim, i, d);
            expect_near(dk[i * stride + d], k_sum, k_error, "dk of %d tokens, dim %d: (%d, %d)", length, dim, i, d);
            expect_near(dv[i * stride + d], v, v_error, "dv of %d tokens, dim %d: (%d, %d)", length, dim, i, d);
        }
}

}  // namespace

TEST(attend_to_a_text) {
    TextScratch scratch;
    for (int length : {100, 1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65}) check_forward(length, 32, scratch);
    for (int dim : {64, 96, 128}) check_forward(37, dim, scratch);
}

TEST(attend_to_a_text_backward) {
    TextScratch scratch;
    for (int length : {100, 1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65}) check_backward(length, 32, scratch);
    for (int dim : {64, 96, 128}) check_backward(37, dim, scratch);
}
