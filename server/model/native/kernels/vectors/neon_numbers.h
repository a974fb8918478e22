// The rest of it: integers, the order of numbers, their parts, and 16-bit floats.
//
// Products of 16-bit pairs are two fused multiplications and additions each, as avx2.h has them.
#pragma once
#include <climits>

#include "neon.h"

namespace vectors {

inline Floats as_floats(const Words& a) {
    return each([](auto x) { return vreinterpretq_f32_u32(x); }, a);
}
inline Words as_words(const Floats& a) {
    return each([](auto x) { return vreinterpretq_u32_f32(x); }, a);
}
inline Floats to_floats(const Words& a) {
    return each([](auto x) { return vcvtq_f32_s32(vreinterpretq_s32_u32(x)); }, a);
}
inline Words widen_unsigned(const Shorts& x) {
    return {{vmovl_u16(vget_low_u16(x.q[0])), vmovl_high_u16(x.q[0]), vmovl_u16(vget_low_u16(x.q[1])),
             vmovl_high_u16(x.q[1])}};
}
inline Floats from_halfs(const Shorts& x) {  // 16 of fp16
    const float16x8_t low = vreinterpretq_f16_u16(x.q[0]), high = vreinterpretq_f16_u16(x.q[1]);
    return {{vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low), vcvt_f32_f16(vget_low_f16(high)),
             vcvt_high_f32_f16(high)}};
}
inline int least_of(uint16_t mask, const Words& a) {
    const Words x = choose(mask, a, set_words(INT_MAX));
    auto least = [](uint32x4_t y, uint32x4_t z) {
        return vreinterpretq_u32_s32(vminq_s32(vreinterpretq_s32_u32(y), vreinterpretq_s32_u32(z)));
    };
    return vminvq_s32(vreinterpretq_s32_u32(least(least(x.q[0], x.q[1]), least(x.q[2], x.q[3]))));
}

inline Words add_longs(const Words& a, const Words& b) {
    auto one = [](auto x, auto y) {
        return vreinterpretq_u32_u64(vaddq_u64(vreinterpretq_u64_u32(x), vreinterpretq_u64_u32(y)));
    };
    return each(one, a, b);
}
inline Words operator&(const Words& a, const Words& b) {
    return each([](auto x, auto y) { return x & y; }, a, b);
}
inline Words operator|(const Words& a, const Words& b) {
    return each([](auto x, auto y) { return x | y; }, a, b);
}
inline Words operator^(const Words& a, const Words& b) {
    return each([](auto x, auto y) { return x ^ y; }, a, b);
}
inline Words left(const Words& a, int bits) {
    return each([&](auto x) { return x << bits; }, a);
}
inline Words right(const Words& a, int bits) {
    return each([&](auto x) { return x >> bits; }, a);
}

// Of each 128 bits of both, as AVX-512 has them.
inline Words unpack_low_words(const Words& a, const Words& b) {
    return each([](auto x, auto y) { return vzip1q_u32(x, y); }, a, b);
}
inline Words unpack_high_words(const Words& a, const Words& b) {
    return each([](auto x, auto y) { return vzip2q_u32(x, y); }, a, b);
}
inline Words unpack_low_longs(const Words& a, const Words& b) {
    auto one = [](auto x, auto y) {
        return vreinterpretq_u32_u64(vzip1q_u64(vreinterpretq_u64_u32(x), vreinterpretq_u64_u32(y)));
    };
    return each(one, a, b);
}
inline Words unpack_high_longs(const Words& a, const Words& b) {
    auto one = [](auto x, auto y) {
        return vreinterpretq_u32_u64(vzip2q_u64(vreinterpretq_u64_u32(x), vreinterpretq_u64_u32(y)));
    };
    return each(one, a, b);
}
template <int which>
inline Words quarters(const Words& a, const Words& b) {  // the even or the odd ones, a's first
    static_assert(which == 0x88 || which == 0xdd);
    constexpr int kFirst = which == 0x88 ? 0 : 1;
    return {{a.q[kFirst], a.q[kFirst + 2], b.q[kFirst], b.q[kFirst + 2]}};
}

// 16 words: the first of each two, or the second.
inline Words evens(const Words& a, const Words& b) {
    return {{vuzp1q_u32(a.q[0], a.q[1]), vuzp1q_u32(a.q[2], a.q[3]), vuzp1q_u32(b.q[0], b.q[1]),
             vuzp1q_u32(b.q[2], b.q[3])}};
}
inline Words odds(const Words& a, const Words& b) {
    return {{vuzp2q_u32(a.q[0], a.q[1]), vuzp2q_u32(a.q[2], a.q[3]), vuzp2q_u32(b.q[0], b.q[1]),
             vuzp2q_u32(b.q[2], b.q[3])}};
}
inline Words right_signed(const Words& a, int bits) {
    return each([&](auto x) { return (uint32x4_t)((int32x4_t)x >> bits); }, a);
}
inline Words widen_signed_shorts(const Shorts& x) {
    auto low = [](uint16x8_t y) { return (uint32x4_t)vmovl_s16(vget_low_s16((int16x8_t)y)); };
    auto high = [](uint16x8_t y) { return (uint32x4_t)vmovl_high_s16((int16x8_t)y); };
    return {{low(x.q[0]), high(x.q[0]), low(x.q[1]), high(x.q[1])}};
}

inline Floats low_code(const Words& x) { return to_floats(x & set_words(15)); }
inline Floats high_code(const Words& x) { return low_code(right(x, 16)); }

// 2^n · x, for whole n from -150 to 127.
inline Floats scale(const Floats& x, const Floats& n) {
    auto power = [](int32x4_t exponent) {
        return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(exponent, vdupq_n_s32(127)), 23));
    };
    auto one = [&](float32x4_t of, float32x4_t by) {
        const int32x4_t exponent = vcvtnq_s32_f32(by), half = vshrq_n_s32(exponent, 1);
        return vmulq_f32(vmulq_f32(of, power(half)), power(vsubq_s32(exponent, half)));
    };
    return each(one, x, n);
}
inline Floats round(const Floats& a) {
    return each([](auto x) { return vrndnq_f32(x); }, a);
}
// Of positive normal numbers: 2^exponent · mantissa, 1 ≤ mantissa < 2, which is halved from 1.5 on.
inline Floats exponent(const Floats& x) { return subtract(to_floats(right(as_words(x), 23)), set(127)); }
inline Floats mantissa(const Floats& a) {
    auto one = [](float32x4_t x) {
        const uint32x4_t bits = vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x007fffff));
        const float32x4_t m = vreinterpretq_f32_u32(vorrq_u32(bits, vdupq_n_u32(0x3f800000)));
        return vbslq_f32(vcgeq_f32(m, vdupq_n_f32(1.5f)), vmulq_f32(m, vdupq_n_f32(0.5f)), m);
    };
    return each(one, a);
}

// Rounded to 16 bits, to the nearest one and of two to the even one; NaN stays NaN.
inline uint16x8_t to_bf16(float32x4_t low, float32x4_t high) {
    auto rounded = [](float32x4_t x) {  // in the high half of each 32 bits
        const uint32x4_t bits = vreinterpretq_u32_f32(x), is_odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t nearest = vaddq_u32(bits, vaddq_u32(is_odd, vdupq_n_u32(0x7fff)));
        const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x00400000));
        return vreinterpretq_u16_u32(vbslq_u32(vceqq_f32(x, x), nearest, quiet));
    };
    return vuzp2q_u16(rounded(low), rounded(high));
}
inline Shorts to_bf16(const Floats& x) { return {{to_bf16(x.q[0], x.q[1]), to_bf16(x.q[2], x.q[3])}}; }

inline Floats add_pairs(const Floats& sum, const Words& a, const Words& b) {
    auto first = [](uint32x4_t x) { return vreinterpretq_f32_u32(vshlq_n_u32(x, 16)); };
    auto second = [](uint32x4_t x) { return vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000))); };
    auto one = [&](float32x4_t to, uint32x4_t x, uint32x4_t y) {
        return vfmaq_f32(vfmaq_f32(to, second(x), second(y)), first(x), first(y));
    };
    return each(one, sum, a, b);
}

// Two rows of 32 numbers of 16 bits side by side.
inline void store_interleaved(const Words& a, const Words& b, void* to) {
    for (int i = 0; i < 4; i++) {
        const uint16x8_t x = vreinterpretq_u16_u32(a.q[i]), y = vreinterpretq_u16_u32(b.q[i]);
        store((char*)to + 32 * i, Shorts{{vzip1q_u16(x, y), vzip2q_u16(x, y)}});
    }
}
inline uint16_t are_not_zero(uint8x16_t bytes) { return mask_of(vtstq_u8(bytes, bytes)); }

}  // namespace vectors
