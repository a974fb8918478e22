// Expands stored weights if a product of bf16 pairs is made of two fp32 products: the first and the second inputs of
// pairs are in separate vectors, both in fp32.
#pragma once

namespace simd {

// The first vector of split numbers has the first inputs of pairs, the second has the second ones.
using Pairs = SplitFloats;                // values of bf16 precision
using Scales = F32x16;                    // of 16 outputs, for both inputs
constexpr bool kKeepsSignOfZero = false;  // a scaled -0 may become +0, which changes no sum

inline Scales load_scales(const uint16_t* halfs) { return from_f16(load_u16(halfs)); }
inline SplitWords split_words(const uint32_t* p) {  // [16][2]
    const U32x16 a = load_u32(p), b = load_u32(p + 16);
    return {even_lanes(a, b), odd_lanes(a, b)};
}
inline SplitFloats split_bytes(const int8_t* p) {  // [16][2]
    const U32x16 pairs = widen_signed(load_u16(p));
    return {to_f32(shift_signed(pairs << 24, 24)), to_f32(shift_signed(pairs, 8))};
}

// Rounds to the nearest bf16, ties to even, for numbers below 2^111. It splits a number as Veltkamp does (T. J. Dekker,
// A floating-point technique for extending the available precision, 1971): the product is rounded at bf16's last bit.
// With the usual 65537 instead of 65535 the product could reach the next power of two.
inline F32x16 round_to_16_bits(const F32x16& x) { return fmadd(x, broadcast(65536.0f), x * broadcast(-65535.0f)); }
inline Pairs scaled(const SplitFloats& x, const Scales& scales) {
    return {round_to_16_bits(x.first * scales), round_to_16_bits(x.second * scales)};
}
inline Pairs scaled(const SplitFloats& x, const Scales& scales, const Scales& least) {
    return {round_to_16_bits(fmadd(x.first, scales, least)), round_to_16_bits(fmadd(x.second, scales, least))};
}

// The pairs in the layout of `fmadd_pairs`.
inline U32x16 packed(const Pairs& w) { return (as_u32(w.first) >> 16) | as_u32(w.second); }

// Has the bits of `fmadd_pairs` with packed pairs.
inline F32x16 add_products(const F32x16& sum, const U32x16& x, const Pairs& w) {
    const F32x16 second = as_f32(x & broadcast_u32(0xffff0000)), first = as_f32(x << 16);
    return fmadd(first, w.first, fmadd(second, w.second, sum));
}

}  // namespace simd
