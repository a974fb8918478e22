// How stored weights are expanded for products of 16-bit pairs: both inputs of a pair side by side, as those take them.
#pragma once

namespace vectors {

// Of split numbers one vector is of outputs 0 to 7, the other of 8 to 15.
using Pairs = __m512bh;
using Scales = SplitFloats;
constexpr bool kKeepsSignOfZero = true;

inline Scales load_scales(const uint16_t* halfs) {
    const __m512i first = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512 x = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)halfs));
    return {_mm512_permutexvar_ps(first, x), _mm512_permutexvar_ps(_mm512_add_epi32(first, _mm512_set1_epi32(8)), x)};
}
inline SplitWords split_words(const uint32_t* p) {  // [16][2]
    return {_mm512_loadu_si512(p), _mm512_loadu_si512(p + 16)};
}
inline SplitFloats split_bytes(const int8_t* p) {  // [16][2]
    auto load = [&](int i) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p + i))));
    };
    return {load(0), load(16)};
}

inline Pairs scaled(const SplitFloats& x, const Scales& by) {
    return _mm512_cvtne2ps_pbh(_mm512_mul_ps(x.other, by.other), _mm512_mul_ps(x.one, by.one));
}
inline Pairs scaled(const SplitFloats& x, const Scales& by, const Scales& least) {
    return _mm512_cvtne2ps_pbh(_mm512_fmadd_ps(x.other, by.other, least.other),
                               _mm512_fmadd_ps(x.one, by.one, least.one));
}

inline __m512i packed(Pairs w) { return (__m512i)w; }

inline __m512 add_products(__m512 sum, __m512bh x, Pairs w) { return _mm512_dpbf16_ps(sum, x, w); }

}  // namespace vectors
