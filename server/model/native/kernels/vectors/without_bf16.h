// What AVX-512 lacks without its bf16 instructions, under the same names, as avx2.h has it.
#pragma once
#include <immintrin.h>

namespace avx512 {

inline __m512i round_to_bf16(__m512 x) {  // in the low half of each 32 bits
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
    return _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet), 16);
}
inline __m256i to_bf16(__m512 x) { return _mm512_cvtepi32_epi16(round_to_bf16(x)); }

inline __m512 add_pairs(__m512 sum, __m512i a, __m512i b) {
    const __m512i second = _mm512_set1_epi32((int)0xffff0000);
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, second)),
                          _mm512_castsi512_ps(_mm512_and_si512(b, second)), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)),
                           sum);
}

}  // namespace avx512

#define __m512bh __m512i
#define _mm512_cvtneps_pbh avx512::to_bf16
#define _mm512_cvtne2ps_pbh(high, low) \
    _mm512_inserti64x4(_mm512_castsi256_si512(avx512::to_bf16(low)), avx512::to_bf16(high), 1)
#define _mm512_dpbf16_ps avx512::add_pairs
