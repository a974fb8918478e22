// Operations on single rows, and their gradients: RMSNorm, rotary positions and SwiGLU.
#pragma once
#include <cmath>

#include "numbers.h"

// Returns 1 / rms(x) for x (size), with rms(x) = √(mean(x²) + eps).
inline float inverse_rms(const float* x, int64_t size, double eps) {
    F32x16 sum{};
    for (int64_t i = 0; i < size; i += 16) sum = fmadd(load(x + i), load(x + i), sum);
    return 1.0f / std::sqrt(reduce_add(sum) / size + static_cast<float>(eps));
}

// y (size) = x · inverse · weight
inline void scale_by_weight(const float* x, float inverse, const bf16* weight, int64_t size, bf16* y) {
    const F32x16 inverses = broadcast(inverse);
    for (int64_t i = 0; i < size; i += 16) store_bf16(y + i, load(x + i) * inverses * load_bf16(weight + i));
}

// y (size) = x / rms(x) · weight. Returns 1 / rms(x).
inline float rms_norm(const float* x, const bf16* weight, int64_t size, double eps, bf16* y) {
    const float inverse = inverse_rms(x, size, eps);
    scale_by_weight(x, inverse, weight, size, y);
    return inverse;
}

// Rotates a head's values (dim) by a position's angles, or by their negatives if `back`. The pair (i, i + dim / 2) is a
// plane. `table` is `rotary_table`'s (2, max_positions, dim): cosines, then sines.
inline void rotate(float* values, const float* table, int64_t max_positions, int64_t dim, int64_t position, bool back) {
    const int64_t half = dim / 2;
    const float* cos = table + position * dim + half;
    const float* sin = cos + max_positions * dim;  // the first half of the row is negated
    const F32x16 direction = broadcast(back ? -1.0f : 1.0f);
    for (int64_t i = 0; i < half; i += 16) {
        const F32x16 a = load(values + i), b = load(values + half + i);
        const F32x16 c = load(cos + i), s = load(sin + i) * direction;
        store(values + i, fnmadd(b, s, a * c));        // a cos - b sin
        store(values + half + i, fmadd(a, s, b * c));  // a sin + b cos
    }
}

inline F32x16 silu(F32x16 x) { return x / (broadcast(1.0f) + exp16(F32x16{} - x)); }

// y (count) = x, rounded to bf16.
inline void round_to_bf16(const float* x, int64_t count, bf16* y) {
    for (int64_t i = 0; i < count; i += 16) store_bf16(y + i, load(x + i));
}

// sum (size) = the sum of `count` rows of x, `stride` numbers apart, added in order.
inline void sum_rows(const float* x, int64_t stride, int64_t size, int64_t count, float* sum) {
    for (int64_t i = 0; i < size; i += 16) {
        F32x16 total = load(x + i);
        for (int64_t row = 1; row < count; row++) total = total + load(x + row * stride + i);
        store(sum + i, total);
    }
}

// d_x (size) += the gradient of rms_norm's x, given dy and `inverse` = 1 / rms(x): (g - n · mean(g · n)) / rms(x) with
// n = x / rms(x) and g = dy · weight.
inline void rms_norm_backward(const float* x, float inverse, const bf16* weight, int64_t size, const float* dy,
                              float* d_x) {
    const F32x16 inverses = broadcast(inverse);
    auto g = [&](int64_t i) { return load(dy + i) * load_bf16(weight + i); };
    F32x16 sum{};
    for (int64_t i = 0; i < size; i += 16) sum = fmadd(g(i), load(x + i) * inverses, sum);
    const F32x16 mean = broadcast(reduce_add(sum) / size) * inverses;
    for (int64_t i = 0; i < size; i += 16) {
        F32x16 d = fnmadd(load(x + i), mean, g(i));
        store(d_x + i, fmadd(d, inverses, load(d_x + i)));
    }
}

// d_weight (size) += the sum over tokens of dy · x / rms(x), for the columns [column, column + 32). x and dy are
// (tokens, size).
inline void add_norm_gradient(const float* x, const float* inverse_rms, const float* dy, int tokens, int64_t size,
                              int64_t column, float* d_weight) {
    for (int64_t i = column; i < column + kTile; i += 16) {
        F32x16 sum = load(d_weight + i);
        for (int t = 0; t < tokens; t++)
            sum = fmadd(load(dy + t * size + i), load(x + t * size + i) * broadcast(inverse_rms[t]), sum);
        store(d_weight + i, sum);
    }
}

// Adds the rows of dx (tokens, size) to their tokens' rows of d_embed (vocab, size), in order, for the columns
// [column, column + 32).
inline void add_embedding_gradient(const float* dx, const int64_t* token_ids, int tokens, int64_t size, int64_t column,
                                   float* d_embed) {
    for (int t = 0; t < tokens; t++)
        for (int64_t i = column; i < column + kTile; i += 16) {
            float* sum = d_embed + token_ids[t] * size + i;
            store(sum, load(sum) + load(dx + t * size + i));
        }
}

// y (size) = silu(gate) · up
inline void swiglu(const bf16* gate, const bf16* up, int64_t size, bf16* y) {
    for (int64_t i = 0; i < size; i += 16) store_bf16(y + i, silu(load_bf16(gate + i)) * load_bf16(up + i));
}

// d_gate and d_up (size): the gradients of swiglu's inputs, given dy. Recomputes y.
inline void swiglu_backward(const bf16* gate, const bf16* up, const float* dy, int64_t size, bf16* d_gate, bf16* d_up,
                            bf16* y) {
    const F32x16 one = broadcast(1);
    for (int64_t i = 0; i < size; i += 16) {
        const F32x16 g = load_bf16(gate + i), u = load_bf16(up + i), d = load(dy + i);
        const F32x16 divisor = one + exp16(F32x16{} - g);
        const F32x16 sigmoid = one / divisor, gated = g * sigmoid;
        const F32x16 slope = fmadd(gated, one - sigmoid, sigmoid);  // silu' = σ · (1 + g · (1 - σ))
        store_bf16(d_gate + i, d * u * slope);
        store_bf16(d_up + i, d * gated);
        store_bf16(y + i, g / divisor * u);  // the same bits as swiglu's
    }
}
