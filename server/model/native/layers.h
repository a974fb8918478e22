// What serving and training share: the base's sizes, its groups of modules, and the arithmetic of single rows.
#pragma once
#include <cmath>

#include "numbers.h"

enum Group { kQkv, kO, kGateUp, kDown, kGroups };  // in the order of rank_rows.GROUPS

struct Sizes {
    int64_t vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, max_positions, threads;
    double eps;
};

// 1 / the root mean square of x (size).
inline float inverse_rms(const float* x, int64_t size, double eps) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) sum = _mm512_fmadd_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(x + i), sum);
    return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / size + (float)eps);
}

// y (size) = x, divided by its root mean square and times `weight`.
inline void rms_norm(const float* x, const bf16* weight, int64_t size, double eps, bf16* y) {
    const __m512 by = _mm512_set1_ps(inverse_rms(x, size, eps));
    for (int64_t i = 0; i < size; i += 16)
        store_bf16(y + i, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + i), by), load_bf16(weight + i)));
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

inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}
