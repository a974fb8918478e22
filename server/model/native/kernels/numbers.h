// Vectors of bf16 numbers, and e^x and ln x of a vector of floats.
#pragma once

#include <cstring>
#include <initializer_list>

#include "seam/abi.h"
#include "simd/simd.h"

// Loads 16 numbers and widens them to fp32.
inline F32x16 load_bf16(const bf16* p) { return as_f32(widen(load_u16(p)) << 16); }

// Rounds to the nearest bf16, ties to even.
inline void store_bf16(bf16* p, F32x16 x) { store(p, to_bf16(x)); }

// Loads 16 pairs, the operand of `fmadd_pairs`.
inline U32x16 load_pairs(const bf16* p) { return load_u32(p); }

// The pair at p, in one number.
inline uint32_t load_pair(const bf16* p) {
    uint32_t pair;
    memcpy(&pair, p, sizeof pair);
    return pair;
}

// The pair at p in all 16 lanes.
inline U32x16 broadcast_pair(const bf16* p) { return broadcast_u32(load_pair(p)); }

// Lanes [0, count); count may be negative or more than 16.
inline Mask16 first_lanes(int count) {
    return static_cast<Mask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}

// e^x within 3 ulp: 2^n · e^r with |r| ≤ ln(2)/2 and e^r by its Taylor polynomial of degree 6. NaN stays NaN.
inline F32x16 exp16(F32x16 x) {
    x = min(broadcast(88.0f), max(broadcast(-104.0f), x));
    F32x16 n = round_to_whole(x * broadcast(1.44269504f));
    F32x16 r = fnmadd(n, broadcast(0.693359375f), x);
    r = fnmadd(n, broadcast(-2.12194440e-4f), r);
    F32x16 p = broadcast(1.0f / 720);
    for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fmadd(p, r, broadcast(c));
    return scale_by_power(p, n);
}

// ln x within 2 ulp, for positive normal x. With x = 2^e · m, 0.75 ≤ m < 1.5, f = m - 1 and s = f / (2 + f) it is
// e · ln(2) + 2 · artanh(s), where 2s = f - f²/2 + s · f²/2 and the rest is artanh's series up to s^11.
inline F32x16 log16(F32x16 x) {
    const F32x16 m = mantissa(x), one = broadcast(1.0f);
    F32x16 e = exponent(x);
    e = choose(is_less(m, one), e + one, e);
    const F32x16 f = m - one, half = f * f * broadcast(0.5f);
    const F32x16 s = f / (f + broadcast(2.0f)), s2 = s * s;
    F32x16 p = broadcast(2.0f / 11);
    for (float c : {2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3}) p = fmadd(p, s2, broadcast(c));
    const F32x16 rest = s * fmadd(p, s2, half);
    const F32x16 low = fmadd(e, broadcast(-2.12194440e-4f), rest);
    return fmadd(e, broadcast(0.693359375f), f - (half - low));
}
