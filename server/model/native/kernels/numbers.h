// 16-bit floats, a vector exponential and a vector logarithm.
#pragma once

#include <initializer_list>

#include "seam/abi.h"
#include "vectors/vectors.h"

inline __m512 load_bf16(const bf16* p) {  // 16 of them, widened
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

inline void store_bf16(bf16* p, __m512 x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }

inline __m512bh load_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

inline __mmask16 first_lanes(int count) {
    return (__mmask16)(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}

// e^x within 3 ulp: 2^n · e^r with |r| ≤ ln(2)/2 and e^r by its Taylor polynomial of degree 6. NaN stays NaN.
inline __m512 exp16(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(_mm512_set1_ps(-104.0f), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}

// ln x within 2 ulp, for positive normal x. With x = 2^e · m, 0.75 ≤ m < 1.5, f = m - 1 and s = f / (2 + f) it is
// e · ln(2) + 2 · artanh(s), where 2s = f - f²/2 + s · f²/2 and the rest is artanh's series up to s^11.
inline __m512 log16(__m512 x) {
    const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero), one = _mm512_set1_ps(1.0f);
    __m512 e = _mm512_getexp_ps(x);
    e = _mm512_mask_add_ps(e, _mm512_cmp_ps_mask(m, one, _CMP_LT_OQ), e, one);
    const __m512 f = _mm512_sub_ps(m, one), half = _mm512_mul_ps(_mm512_mul_ps(f, f), _mm512_set1_ps(0.5f));
    const __m512 s = _mm512_div_ps(f, _mm512_add_ps(f, _mm512_set1_ps(2.0f))), s2 = _mm512_mul_ps(s, s);
    __m512 p = _mm512_set1_ps(2.0f / 11);
    for (float c : {2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3}) p = _mm512_fmadd_ps(p, s2, _mm512_set1_ps(c));
    const __m512 rest = _mm512_mul_ps(s, _mm512_fmadd_ps(p, s2, half));
    const __m512 low = _mm512_fmadd_ps(e, _mm512_set1_ps(-2.12194440e-4f), rest);
    return _mm512_fmadd_ps(e, _mm512_set1_ps(0.693359375f), _mm512_sub_ps(f, _mm512_sub_ps(half, low)));
}
