// What kernels use beside AVX-512's instructions, and its bf16 instructions under their names for processors without.
#pragma once
#include <cstdint>

#include "x86.h"

namespace vectors {

constexpr int kSums = 24, kWideSums = 0;
#ifdef __AVX512BF16__
constexpr int kStoredRows = 10;
#else
constexpr int kStoredRows = 4;
#endif

inline void store_interleaved(__m512i a, __m512i b, uint32_t* to) {
    alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(a, high, b));
}

// A permutation looks at the lowest four bits of 32 alone, or at five of 16, of which the last has no say here. The
// upper half of a float is its 16-bit number.
inline __m512 low_code(__m512i x) {
    return _mm512_permutexvar_ps(x, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}
inline __m512 high_code(__m512i x) {
    alignas(64) static constexpr uint16_t kCodes[32] = {0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                                        0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170,
                                                        0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                                        0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    return (__m512)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, x, _mm512_load_si512(kCodes));
}

#ifndef __AVX512BF16__
inline __m512i round_to_bf16(__m512 x) {  // in the low half of each 32 bits
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
    return _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet), 16);
}
inline __m256i to_bf16(__m512 x) { return _mm512_cvtepi32_epi16(round_to_bf16(x)); }
inline __m512i to_bf16(__m512 high, __m512 low) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(to_bf16(low)), to_bf16(high), 1);
}

inline __m512 add_pairs(__m512 sum, __m512i a, __m512i b) {
    const __m512i second = _mm512_set1_epi32((int)0xffff0000);
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, second)),
                          _mm512_castsi512_ps(_mm512_and_si512(b, second)), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)),
                           sum);
}
#endif

}  // namespace vectors

#ifndef __AVX512BF16__
#define __m512bh __m512i
#define _mm512_cvtneps_pbh vectors::to_bf16
#define _mm512_cvtne2ps_pbh vectors::to_bf16
#define _mm512_dpbf16_ps vectors::add_pairs
#endif
