// The instructions that kernels are written in: AVX-512's with bf16 products, or the same made of what there is.
#pragma once
#include <immintrin.h>

#include <cstdint>

#if !defined(__AVX512F__)
#include "avx2_names.h"
#elif !defined(__AVX512BF16__)
#include "without_bf16.h"
#endif

#ifdef __AVX512F__
constexpr int kSums = 24;  // of 16 numbers that registers hold beside what they are made of
#else
constexpr int kSums = 4;
#endif

// Two rows of 32 numbers of 16 bits side by side, [32][2].
inline void store_interleaved(__m512i a, __m512i b, uint32_t* to) {
#ifdef __AVX512F__
    alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(a, high, b));
#else
    _mm512_storeu_si512(to, avx2::interleave(a.low, b.low));
    _mm512_storeu_si512(to + 16, avx2::interleave(a.high, b.high));
#endif
}
// 32 numbers, none of them NaN, rounded to 16 bits.
inline __m512bh pairs_of(__m512 high, __m512 low) {
#ifdef __AVX512F__
    return _mm512_cvtne2ps_pbh(high, low);
#else
    return avx2::numbers_to_bf16(high, low);
#endif
}
// What the lowest four bits of 16 numbers are.
inline __m512 lowest_bits(__m512i x) {
#ifdef __AVX512F__
    return _mm512_permutexvar_ps(x, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
#else
    return avx2::low_bits(x);
#endif
}
// Eight numbers of x's sixteen, each twice: the first ones, or the others.
inline __m512 twice(__m512 x, int first) {
#ifdef __AVX512F__
    const __m512i of = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_ps(_mm512_add_epi32(of, _mm512_set1_epi32(first)), x);
#else
    return avx2::each_twice(first ? x.high : x.low);
#endif
}
inline __mmask16 are_not_zero(__m128i bytes) {  // of 16
    return (__mmask16)~_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()));
}
