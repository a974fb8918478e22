// The arithmetic of single rows, and its gradients: normalization, rotary positions and the gated activation.
#pragma once
#include <cmath>

#include "numbers.h"

// 1 / the root mean square of x (size).
inline float inverse_rms(const float* x, int64_t size, double eps) {
    F32x16 sum{};
    for (int64_t i = 0; i < size; i += 16) sum = fmadd(load(x + i), load(x + i), sum);
    return 1.0f / std::sqrt(reduce_add(sum) / size + (float)eps);
}

// y (size) = x · inverse · weight
inline void scale_by_weight(const float* x, float inverse, const bf16* weight, int64_t size, bf16* y) {
    const F32x16 by = broadcast(inverse);
    for (int64_t i = 0; i < size; i += 16) store_bf16(y + i, load(x + i) * by * load_bf16(weight + i));
}

// y (size) = x, divided by its root mean square and times `weight`; returns 1 / the root mean square.
inline float rms_norm(const float* x, const bf16* weight, int64_t size, double eps, bf16* y) {
    const float inverse = inverse_rms(x, size, eps);
    scale_by_weight(x, inverse, weight, size, y);
    return inverse;
}

// Turns a head's values by the angles of a position, or back; `table` is (2, max_positions, dim), as `rotary_table`
// makes it.
inline void rotate(float* values, const float* table, int64_t max_positions, int64_t dim, int64_t position, bool back) {
    const int64_t half = dim / 2;
    const float* cos = table + position * dim + half;
    const float* sin = cos + max_positions * dim;  // the other half is negated
    const F32x16 direction = broadcast(back ? -1.0f : 1.0f);
    for (int64_t i = 0; i < half; i += 16) {
        F32x16 a = load(values + i), b = load(values + half + i);
        F32x16 c = load(cos + i), d = load(sin + i) * direction;
        store(values + i, fnmadd(b, d, a * c));
        store(values + half + i, fmadd(a, d, b * c));
    }
}

inline F32x16 silu(F32x16 x) { return x / (broadcast(1.0f) + exp16(F32x16{} - x)); }

// y = x's count numbers, rounded to 16 bits.
inline void round_to_bf16(const float* x, int64_t count, bf16* y) {
    for (int64_t i = 0; i < count; i += 16) store_bf16(y + i, load(x + i));
}

// sum (size) = the sum of `count` rows of x, `stride` apart, one after the other.
inline void sum_rows(const float* x, int64_t stride, int64_t size, int64_t count, float* sum) {
    for (int64_t i = 0; i < size; i += 16) {
        F32x16 all = load(x + i);
        for (int64_t row = 1; row < count; row++) all = all + load(x + row * stride + i);
        store(sum + i, all);
    }
}

// The gradient of rms_norm's x is added to `d_x`, from that of its y, dy, and 1 / x's root mean square: (g - n · mean(g
// · n)) / rms for n = x / rms, g = dy · weight.
inline void rms_norm_backward(const float* x, float inverse, const bf16* weight, int64_t size, const float* dy,
                              float* d_x) {
    const F32x16 by = broadcast(inverse);
    auto g = [&](int64_t i) { return load(dy + i) * load_bf16(weight + i); };
    F32x16 sum{};
    for (int64_t i = 0; i < size; i += 16) sum = fmadd(g(i), load(x + i) * by, sum);
    const F32x16 mean = broadcast(reduce_add(sum) / size) * by;
    for (int64_t i = 0; i < size; i += 16) {
        F32x16 d = fnmadd(load(x + i), mean, g(i));
        store(d_x + i, fmadd(d, by, load(d_x + i)));
    }
}

// d_weight += the sum over tokens of dy · x / rms, for the 32 numbers of each (tokens, size) from `column` on.
inline void add_norm_gradient(const float* x, const float* inverse_rms, const float* dy, int tokens, int64_t size,
                              int64_t column, float* d_weight) {
    for (int64_t i = column; i < column + kTile; i += 16) {
        F32x16 sum = load(d_weight + i);
        for (int t = 0; t < tokens; t++)
            sum = fmadd(load(dy + t * size + i), load(x + t * size + i) * broadcast(inverse_rms[t]), sum);
        store(d_weight + i, sum);
    }
}

// d_embed (vocab, size): rows of dx are added to their tokens', one after the other, for 32 numbers from `column` on.
inline void add_embedding_gradient(const float* dx, const int64_t* token_ids, int tokens, int64_t size, int64_t column,
                                   float* d_embed) {
    for (int t = 0; t < tokens; t++)
        for (int64_t i = column; i < column + kTile; i += 16) {
            float* to = d_embed + token_ids[t] * size + i;
            store(to, load(to) + load(dx + t * size + i));
        }
}

// y (size) = silu(gate) · up
inline void swiglu(const bf16* gate, const bf16* up, int64_t size, bf16* y) {
    for (int64_t i = 0; i < size; i += 16) store_bf16(y + i, silu(load_bf16(gate + i)) * load_bf16(up + i));
}

// The gradients of gate and up, from that of swiglu's y, and y once more.
inline void swiglu_backward(const bf16* gate, const bf16* up, const float* dy, int64_t size, bf16* d_gate, bf16* d_up,
                            bf16* y) {
    const F32x16 one = broadcast(1);
    for (int64_t i = 0; i < size; i += 16) {
        F32x16 g = load_bf16(gate + i), u = load_bf16(up + i), d = load(dy + i);
        F32x16 divisor = one + exp16(F32x16{} - g);
        F32x16 share = one / divisor, gated = g * share;
        // silu' = share · (1 + g · (1 - share))
        F32x16 slope = fmadd(gated, one - share, share);
        store_bf16(d_gate + i, d * u * slope);
        store_bf16(d_up + i, d * gated);
        store_bf16(y + i, g / divisor * u);  // the very bits of swiglu
    }
}
