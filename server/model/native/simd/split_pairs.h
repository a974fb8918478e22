// Expands stored weights if a product of 16-bit pairs is made of two fp32 products: the first and the second inputs of
// pairs are kept in separate vectors, both in fp32.
#pragma once

namespace simd {

// Of split numbers one vector is for the first inputs, the other for the second ones.
using Pairs = SplitFloats;                // bf16 numbers
using Scales = F32x16;                    // of 16 outputs, for both inputs
constexpr bool kKeepsSignOfZero = false;  // of scaled numbers, which changes no sum

inline Scales load_scales(const uint16_t* halfs) { return from_f16(load_u16(halfs)); }
inline SplitWords split_words(const uint32_t* p) {  // [16][2]
    const U32x16 a = load_u32(p), b = load_u32(p + 16);
    return {even_lanes(a, b), odd_lanes(a, b)};
}
inline SplitFloats split_bytes(const int8_t* p) {  // [16][2]
    const U32x16 both = widen_signed(load_u16(p));
    return {to_f32(shift_signed(both << 24, 24)), to_f32(shift_signed(both, 8))};
}

// Rounds to the nearest bf16, ties to even, as Veltkamp splits numbers (T. J. Dekker, A floating-point technique for
// extending the available precision, 1971): the product is rounded at bf16's last bit. It must not reach the next power
// of two, as it would with 65537. For numbers below 2^111.
inline F32x16 round_to_16_bits(const F32x16& x) { return fmadd(x, broadcast(65536.0f), x * broadcast(-65535.0f)); }
inline Pairs scaled(const SplitFloats& x, const Scales& by) {
    return {round_to_16_bits(x.one * by), round_to_16_bits(x.other * by)};
}
inline Pairs scaled(const SplitFloats& x, const Scales& by, const Scales& least) {
    return {round_to_16_bits(fmadd(x.one, by, least)), round_to_16_bits(fmadd(x.other, by, least))};
}

inline U32x16 packed(const Pairs& w) { return (as_u32(w.one) >> 16) | as_u32(w.other); }

// The sums of `fmadd_pairs` of packed pairs.
inline F32x16 add_products(const F32x16& sum, const U32x16& x, const Pairs& w) {
    const F32x16 second = as_f32(x & broadcast_u32(0xffff0000)), first = as_f32(x << 16);
    return fmadd(first, w.one, fmadd(second, w.other, sum));
}

}  // namespace simd
