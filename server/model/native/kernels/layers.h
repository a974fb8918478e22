// The arithmetic of single rows, and its gradients: normalization, rotary positions and the gated activation.
#pragma once
#include <cmath>

#include "numbers.h"

// 1 / the root mean square of x (size).
inline float inverse_rms(const float* x, int64_t size, double eps) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) sum = _mm512_fmadd_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(x + i), sum);
    return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / size + (float)eps);
}

// y (size) = x · inverse · weight
inline void scale_by_weight(const float* x, float inverse, const bf16* weight, int64_t size, bf16* y) {
    const __m512 by = _mm512_set1_ps(inverse);
    for (int64_t i = 0; i < size; i += 16)
        store_bf16(y + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), by), load_bf16(weight + i)));
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
    const __m512 direction = _mm512_set1_ps(back ? -1.0f : 1.0f);
    for (int64_t i = 0; i < half; i += 16) {
        __m512 a = _mm512_loadu_ps(values + i), b = _mm512_loadu_ps(values + half + i);
        __m512 c = _mm512_loadu_ps(cos + i), d = _mm512_mul_ps(_mm512_loadu_ps(sin + i), direction);
        _mm512_storeu_ps(values + i, _mm512_fnmadd_ps(b, d, _mm512_mul_ps(a, c)));
        _mm512_storeu_ps(values + half + i, _mm512_fmadd_ps(a, d, _mm512_mul_ps(b, c)));
    }
}

inline __m512 silu(__m512 x) {
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// y = x's count numbers, rounded to 16 bits.
inline void round_to_bf16(const float* x, int64_t count, bf16* y) {
    for (int64_t i = 0; i < count; i += 16) store_bf16(y + i, _mm512_loadu_ps(x + i));
}

// sum (size) = the sum of `count` rows of x, `stride` apart, one after the other.
inline void sum_rows(const float* x, int64_t stride, int64_t size, int64_t count, float* sum) {
    for (int64_t i = 0; i < size; i += 16) {
        __m512 all = _mm512_loadu_ps(x + i);
        for (int64_t row = 1; row < count; row++) all = _mm512_add_ps(all, _mm512_loadu_ps(x + row * stride + i));
        _mm512_storeu_ps(sum + i, all);
    }
}

// The gradient of rms_norm's x is added to `d_x`, from that of its y, dy, and 1 / x's root mean square: (g - n · mean(g
// · n)) / rms for n = x / rms, g = dy · weight.
inline void rms_norm_backward(const float* x, float inverse, const bf16* weight, int64_t size, const float* dy,
                              float* d_x) {
    const __m512 by = _mm512_set1_ps(inverse);
    auto g = [&](int64_t i) { return _mm512_mul_ps(_mm512_loadu_ps(dy + i), load_bf16(weight + i)); };
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) sum = _mm512_fmadd_ps(g(i), _mm512_mul_ps(_mm512_loadu_ps(x + i), by), sum);
    const __m512 mean = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_add_ps(sum) / size), by);
    for (int64_t i = 0; i < size; i += 16) {
        __m512 d = _mm512_fnmadd_ps(_mm512_loadu_ps(x + i), mean, g(i));
        _mm512_storeu_ps(d_x + i, _mm512_fmadd_ps(d, by, _mm512_loadu_ps(d_x + i)));
    }
}

// d_weight += the sum over tokens of dy · x / rms, for the 32 numbers of each (tokens, size) from `column` on.
inline void add_norm_gradient(const float* x, const float* inverse_rms, const float* dy, int tokens, int64_t size,
                              int64_t column, float* d_weight) {
    for (int64_t i = column; i < column + kTile; i += 16) {
        __m512 sum = _mm512_loadu_ps(d_weight + i);
        for (int t = 0; t < tokens; t++)
            sum =
                _mm512_fmadd_ps(_mm512_loadu_ps(dy + t * size + i),
                                _mm512_mul_ps(_mm512_loadu_ps(x + t * size + i), _mm512_set1_ps(inverse_rms[t])), sum);
        _mm512_storeu_ps(d_weight + i, sum);
    }
}

// d_embed (vocab, size): rows of dx are added to their tokens', one after the other, for 32 numbers from `column` on.
inline void add_embedding_gradient(const float* dx, const int64_t* token_ids, int tokens, int64_t size, int64_t column,
                                   float* d_embed) {
    for (int t = 0; t < tokens; t++)
        for (int64_t i = column; i < column + kTile; i += 16) {
            float* to = d_embed + token_ids[t] * size + i;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_loadu_ps(dx + t * size + i)));
        }
}

// y (size) = silu(gate) · up
inline void swiglu(const bf16* gate, const bf16* up, int64_t size, bf16* y) {
    for (int64_t i = 0; i < size; i += 16)
        store_bf16(y + i, _mm512_mul_ps(silu(load_bf16(gate + i)), load_bf16(up + i)));
}

// The gradients of gate and up, from that of swiglu's y, and y once more.
inline void swiglu_backward(const bf16* gate, const bf16* up, const float* dy, int64_t size, bf16* d_gate, bf16* d_up,
                            bf16* y) {
    const __m512 one = _mm512_set1_ps(1);
    for (int64_t i = 0; i < size; i += 16) {
        __m512 g = load_bf16(gate + i), u = load_bf16(up + i), d = _mm512_loadu_ps(dy + i);
        __m512 divisor = _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), g)));
        __m512 share = _mm512_div_ps(one, divisor), gated = _mm512_mul_ps(g, share);
        // silu' = share · (1 + g · (1 - share))
        __m512 slope = _mm512_fmadd_ps(gated, _mm512_sub_ps(one, share), share);
        store_bf16(d_gate + i, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
        store_bf16(d_up + i, _mm512_mul_ps(d, gated));
        store_bf16(y + i, _mm512_mul_ps(_mm512_div_ps(g, divisor), u));  // the very bits of swiglu
    }
}
