// How stored weights are expanded where a product of 16-bit pairs is made of two of fp32: the first inputs of pairs are
// kept apart from the second ones, and both in fp32.
#pragma once

namespace vectors {

// Of split numbers one vector is of the first inputs, the other of the second ones.
using Pairs = SplitFloats;                // 16-bit numbers
using Scales = Floats;                    // of 16 outputs, for both inputs
constexpr bool kKeepsSignOfZero = false;  // of what is scaled, which changes no sum

inline Scales load_scales(const uint16_t* halfs) { return from_halfs(load_shorts(halfs)); }
inline SplitWords split_words(const uint32_t* p) {  // [16][2]
    const Words a = load_words(p), b = load_words(p + 16);
    return {evens(a, b), odds(a, b)};
}
inline SplitFloats split_bytes(const int8_t* p) {  // [16][2]
    const Words both = widen_signed_shorts(load_shorts(p));
    return {to_floats(right_signed(left(both, 24), 24)), to_floats(right_signed(both, 8))};
}

// To the nearest 16-bit number, and of two to the even one, as Veltkamp splits numbers (T. J. Dekker, A floating-point
// technique for extending the available precision, 1971): the product is rounded where bf16's last bit is. It must not
// reach the next power of two, as it would with 65537. For numbers below 2^111.
inline Floats round_to_16_bits(const Floats& x) { return multiply_add(x, set(65536.0f), multiply(x, set(-65535.0f))); }
inline Pairs scaled(const SplitFloats& x, const Scales& by) {
    return {round_to_16_bits(multiply(x.one, by)), round_to_16_bits(multiply(x.other, by))};
}
inline Pairs scaled(const SplitFloats& x, const Scales& by, const Scales& least) {
    return {round_to_16_bits(multiply_add(x.one, by, least)), round_to_16_bits(multiply_add(x.other, by, least))};
}

inline Words packed(const Pairs& w) { return right(as_words(w.one), 16) | as_words(w.other); }

// The sums of `add_pairs` of packed pairs.
inline Floats add_products(const Floats& sum, const Words& x, const Pairs& w) {
    const Floats second = as_floats(x & set_words((int)0xffff0000)), first = as_floats(left(x, 16));
    return multiply_add(first, w.one, multiply_add(second, w.other, sum));
}

}  // namespace vectors
