// Expands stored weights for an instruction that multiplies bf16 pairs: both inputs of a pair are neighbours.
#pragma once

namespace simd {

// The first vector of split numbers has the outputs 0 to 7, the second has 8 to 15.
using Pairs = U32x16;
using Scales = SplitFloats;
constexpr bool kKeepsSignOfZero = true;

inline Scales load_scales(const uint16_t* halfs) {
    const U32x16 first = lane_numbers() >> 1;  // each scale twice
    const F32x16 scales = _mm512_cvtph_ps(load_u16(halfs));
    const U32x16 second = first + broadcast_u32(8);
    return {_mm512_permutexvar_ps(first.bits, scales), _mm512_permutexvar_ps(second.bits, scales)};
}
inline SplitWords split_words(const uint32_t* p) { return {load_u32(p), load_u32(p + 16)}; }  // [16][2]
inline SplitFloats split_bytes(const int8_t* p) {                                             // [16][2]
    auto load_bytes = [&](int i) {
        return to_f32({_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)))});
    };
    return {load_bytes(0), load_bytes(16)};
}

inline Pairs scaled(const SplitFloats& x, const Scales& scales) {
    return to_bf16(x.second * scales.second, x.first * scales.first);
}
inline Pairs scaled(const SplitFloats& x, const Scales& scales, const Scales& least) {
    return to_bf16(fmadd(x.second, scales.second, least.second), fmadd(x.first, scales.first, least.first));
}

// The pairs in the layout of `fmadd_pairs`.
inline U32x16 packed(Pairs w) { return w; }

inline F32x16 add_products(F32x16 sum, U32x16 x, Pairs w) { return fmadd_pairs(x, w, sum); }

}  // namespace simd
