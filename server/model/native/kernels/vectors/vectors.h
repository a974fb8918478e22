// The instructions that kernels are written in: AVX-512's with bf16 products, or the same made of what there is.
#pragma once
#include <immintrin.h>

#include <cstdint>

#if !defined(__AVX512F__)
#include "avx2.h"
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
inline __mmask16 are_not_zero(__m128i bytes) {  // of 16
    return (__mmask16)~_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()));
}
