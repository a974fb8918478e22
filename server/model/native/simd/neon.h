// simd.h with 64-bit Arm's Advanced SIMD: a vector is four registers. It needs ARMv8-A only.
//
// A product of bf16 pairs is two fused multiplications and additions, as in avx2.h. A minimum or maximum with NaN is
// NaN, while x86 returns the second operand.
#pragma once
#include <arm_neon.h>

#include <climits>
#include <cstdint>
#include <cstring>

namespace simd {

using Mask16 = uint16_t;

constexpr bool is_supported() { return true; }  // every 64-bit Arm processor of Linux has it

constexpr uint64_t kFlushesToZero = 1 << 24;  // denormal operands and results become 0

inline uint64_t float_mode() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
inline void set_float_mode(uint64_t mode) { asm volatile("msr fpcr, %0" ::"r"(mode)); }

// Takes about as long as x86's pause; `yield` takes no time on most processors.
inline void pause() { asm volatile("isb" ::: "memory"); }

constexpr int kSums = 5, kWideSums = 0, kStoredRows = 3;

template <class Quarter>
struct Four {
    Quarter q[4];
};
template <class Half>
struct Two {
    Half q[2];
};
using F32x16 = Four<float32x4_t>;
using F64x8 = Four<float64x2_t>;
using U32x16 = Four<uint32x4_t>;
using U16x16 = Two<uint16x8_t>;

// Applies `function` to each quarter of the vectors.
template <class Operation, class... Vectors>
[[gnu::always_inline]] inline auto each(Operation function, const Vectors&... v) {
    return Four<decltype(function(v.q[0]...))>{
        {function(v.q[0]...), function(v.q[1]...), function(v.q[2]...), function(v.q[3]...)}};
}

template <class Register>
inline Register load_one(const void* p, int index = 0) {
    return reinterpret_cast<Register>(
        vld1q_u8(static_cast<const uint8_t*>(p) + 16 * index));  // bytes may be of any type
}
template <class Register>
inline void store_one(void* p, const Register& x, int index = 0) {
    vst1q_u8(static_cast<uint8_t*>(p) + 16 * index, reinterpret_cast<uint8x16_t>(x));
}
template <class Quarter>
inline Four<Quarter> load_four(const void* p) {
    return {{load_one<Quarter>(p, 0), load_one<Quarter>(p, 1), load_one<Quarter>(p, 2), load_one<Quarter>(p, 3)}};
}
inline F32x16 load(const void* p) { return load_four<float32x4_t>(p); }
inline U32x16 load_u32(const void* p) { return load_four<uint32x4_t>(p); }
inline U16x16 load_u16(const void* p) { return {{load_one<uint16x8_t>(p, 0), load_one<uint16x8_t>(p, 1)}}; }
inline void store(void* p, const U16x16& x) {
    store_one(p, x.q[0], 0);
    store_one(p, x.q[1], 1);
}
template <class Quarter>
inline void store(void* p, const Four<Quarter>& x) {
    store_one(p, x.q[0], 0);
    store_one(p, x.q[1], 1);
    store_one(p, x.q[2], 2);
    store_one(p, x.q[3], 3);
}
inline void store_lines(const char** p, const char* first) {
    for (int i = 0; i < 8; i++) p[i] = first + 64 * i;
}
inline F32x16 broadcast(float x) {
    const float32x4_t all = vdupq_n_f32(x);
    return {{all, all, all, all}};
}
inline U32x16 broadcast_u32(uint32_t x) {
    const uint32x4_t all = vdupq_n_u32(x);
    return {{all, all, all, all}};
}
inline U32x16 lane_numbers() {
    return {{uint32x4_t{0, 1, 2, 3}, uint32x4_t{4, 5, 6, 7}, uint32x4_t{8, 9, 10, 11}, uint32x4_t{12, 13, 14, 15}}};
}

template <class Quarter>
inline Four<Quarter> operator+(const Four<Quarter>& a, const Four<Quarter>& b) {
    return each([](auto x, auto y) { return x + y; }, a, b);
}
inline F32x16 operator-(const F32x16& a, const F32x16& b) {
    return each([](auto x, auto y) { return x - y; }, a, b);
}
template <class Quarter>
inline Four<Quarter> operator*(const Four<Quarter>& a, const Four<Quarter>& b) {
    return each([](auto x, auto y) { return x * y; }, a, b);
}
inline F32x16 operator/(const F32x16& a, const F32x16& b) {
    return each([](auto x, auto y) { return x / y; }, a, b);
}
inline F32x16 min(const F32x16& a, const F32x16& b) {
    return each([](auto x, auto y) { return vminq_f32(x, y); }, a, b);
}
inline F32x16 max(const F32x16& a, const F32x16& b) {
    return each([](auto x, auto y) { return vmaxq_f32(x, y); }, a, b);
}
inline F32x16 fmadd(const F32x16& a, const F32x16& b, const F32x16& c) {
    return each([](auto x, auto y, auto z) { return vfmaq_f32(z, x, y); }, a, b, c);
}
inline F32x16 fnmadd(const F32x16& a, const F32x16& b, const F32x16& c) {
    return each([](auto x, auto y, auto z) { return vfmsq_f32(z, x, y); }, a, b, c);
}
inline F64x8 widen(float32x4_t low, float32x4_t high) {
    return {{vcvt_f64_f32(vget_low_f32(low)), vcvt_high_f64_f32(low), vcvt_f64_f32(vget_low_f32(high)),
             vcvt_high_f64_f32(high)}};
}
inline F64x8 widen_low(const F32x16& x) { return widen(x.q[0], x.q[1]); }
inline F64x8 widen_high(const F32x16& x) { return widen(x.q[2], x.q[3]); }
inline double reduce_add(const F64x8& a) {  // always of those that lie half apart, as avx2.h has it
    return vaddvq_f64(vaddq_f64(vaddq_f64(a.q[0], a.q[2]), vaddq_f64(a.q[1], a.q[3])));
}
inline float reduce_add(const F32x16& a) {
    const float32x4_t four = vaddq_f32(vaddq_f32(a.q[0], a.q[2]), vaddq_f32(a.q[1], a.q[3]));
    return vaddv_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
}
inline float reduce_max(const F32x16& a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.q[0], a.q[1]), vmaxq_f32(a.q[2], a.q[3])));
}

// Masks: bit i is lane i's.
inline uint16_t mask_of(uint8x16_t is_set) {  // of bytes that are all ones or zero
    static constexpr uint8_t kBits[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t bits = vandq_u8(is_set, vld1q_u8(kBits));
    return static_cast<uint16_t>(vaddv_u8(vget_low_u8(bits)) | vaddv_u8(vget_high_u8(bits)) << 8);
}
inline uint16_t mask_of(const U32x16& is_set) {
    auto narrow = [](uint32x4_t low, uint32x4_t high) {
        return vreinterpretq_u8_u16(vuzp1q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high)));
    };
    return mask_of(vuzp1q_u8(narrow(is_set.q[0], is_set.q[1]), narrow(is_set.q[2], is_set.q[3])));
}
inline U32x16 all_lanes(Mask16 mask) {
    const U32x16 bits = {{uint32x4_t{1, 2, 4, 8}, uint32x4_t{1 << 4, 1 << 5, 1 << 6, 1 << 7},
                          uint32x4_t{1 << 8, 1 << 9, 1 << 10, 1 << 11},
                          uint32x4_t{1 << 12, 1 << 13, 1 << 14, 1 << 15}}};
    return each([](auto x, auto y) { return vtstq_u32(x, y); }, broadcast_u32(mask), bits);
}
inline F32x16 choose(Mask16 mask, const F32x16& a, const F32x16& otherwise) {
    return each([](auto of, auto x, auto y) { return vbslq_f32(of, x, y); }, all_lanes(mask), a, otherwise);
}
inline U32x16 choose(Mask16 mask, const U32x16& a, const U32x16& otherwise) {
    return each([](auto of, auto x, auto y) { return vbslq_u32(of, x, y); }, all_lanes(mask), a, otherwise);
}
inline Mask16 is_less(const F32x16& a, const F32x16& b) {
    return mask_of(each([](auto x, auto y) { return vcltq_f32(x, y); }, a, b));
}
inline Mask16 is_less(const U32x16& a, const U32x16& b) {
    auto compare = [](auto x, auto y) { return vcltq_s32(vreinterpretq_s32_u32(x), vreinterpretq_s32_u32(y)); };
    return mask_of(each(compare, a, b));
}
inline Mask16 is_greater(const F32x16& a, const F32x16& b) { return is_less(b, a); }
inline Mask16 is_at_least(const F32x16& a, const F32x16& b) {
    return mask_of(each([](auto x, auto y) { return vcgeq_f32(x, y); }, a, b));
}
inline Mask16 is_equal(const F32x16& a, const F32x16& b) {
    return mask_of(each([](auto x, auto y) { return vceqq_f32(x, y); }, a, b));
}
inline Mask16 is_nan(const F32x16& a) {
    return mask_of(each([](auto x) { return vmvnq_u32(vceqq_f32(x, x)); }, a));
}
// Loads the lanes whose bits are set in the lowest four bits of the mask; other memory isn't accessed.
inline uint32x4_t load_quarter(unsigned mask, const uint32_t* p) {
    if ((mask & 15) == 15) return load_one<uint32x4_t>(p);
    uint32_t all[4] = {};
    for (int i = 0; i < 4; i++)
        if (mask >> i & 1) memcpy(&all[i], p + i, 4);
    return load_one<uint32x4_t>(all);
}
template <class Lane, class Register>
inline void store_some(Lane* p, unsigned mask, Register x) {
    constexpr int kLanes = 16 / sizeof(Lane), kAll = (1 << kLanes) - 1;
    if ((mask & kAll) == kAll) return store_one(p, x);
    Lane all[kLanes];
    store_one(all, x);
    for (int i = 0; i < kLanes; i++)
        if (mask >> i & 1) memcpy(p + i, &all[i], sizeof(Lane));
}
inline U32x16 load_lanes(Mask16 mask, const void* p) {
    auto quarter = [&](int i) { return load_quarter(mask >> 4 * i, static_cast<const uint32_t*>(p) + 4 * i); };
    return {{quarter(0), quarter(1), quarter(2), quarter(3)}};
}
template <class Quarter>
inline void store_lanes(void* p, Mask16 mask, const Four<Quarter>& x) {
    for (int i = 0; i < 4; i++) store_some(static_cast<uint32_t*>(p) + 4 * i, mask >> 4 * i, x.q[i]);
}
inline void store_lanes(void* p, Mask16 mask, const U16x16& x) {
    for (int i = 0; i < 2; i++) store_some(static_cast<uint16_t*>(p) + 8 * i, mask >> 8 * i, x.q[i]);
}

inline F32x16 as_f32(const U32x16& a) {
    return each([](auto x) { return vreinterpretq_f32_u32(x); }, a);
}
inline U32x16 as_u32(const F32x16& a) {
    return each([](auto x) { return vreinterpretq_u32_f32(x); }, a);
}
inline F32x16 to_f32(const U32x16& a) {
    return each([](auto x) { return vcvtq_f32_s32(vreinterpretq_s32_u32(x)); }, a);
}
inline U32x16 widen(const U16x16& x) {
    return {{vmovl_u16(vget_low_u16(x.q[0])), vmovl_high_u16(x.q[0]), vmovl_u16(vget_low_u16(x.q[1])),
             vmovl_high_u16(x.q[1])}};
}
inline F32x16 from_f16(const U16x16& x) {  // fp16 numbers
    const float16x8_t low = vreinterpretq_f16_u16(x.q[0]), high = vreinterpretq_f16_u16(x.q[1]);
    return {{vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low), vcvt_f32_f16(vget_low_f16(high)),
             vcvt_high_f32_f16(high)}};
}
inline int reduce_min(Mask16 mask, const U32x16& a) {
    const U32x16 x = choose(mask, a, broadcast_u32(INT_MAX));
    auto least = [](uint32x4_t y, uint32x4_t z) {
        return vreinterpretq_u32_s32(vminq_s32(vreinterpretq_s32_u32(y), vreinterpretq_s32_u32(z)));
    };
    return vminvq_s32(vreinterpretq_s32_u32(least(least(x.q[0], x.q[1]), least(x.q[2], x.q[3]))));
}

inline U32x16 operator&(const U32x16& a, const U32x16& b) {
    return each([](auto x, auto y) { return x & y; }, a, b);
}
inline U32x16 operator|(const U32x16& a, const U32x16& b) {
    return each([](auto x, auto y) { return x | y; }, a, b);
}
inline U32x16 operator^(const U32x16& a, const U32x16& b) {
    return each([](auto x, auto y) { return x ^ y; }, a, b);
}
inline U32x16 operator<<(const U32x16& a, int bits) {
    return each([&](auto x) { return x << bits; }, a);
}
inline U32x16 operator>>(const U32x16& a, int bits) {
    return each([&](auto x) { return x >> bits; }, a);
}

// Unpack within each 128 bits.
inline U32x16 unpack_low_u32(const U32x16& a, const U32x16& b) {
    return each([](auto x, auto y) { return vzip1q_u32(x, y); }, a, b);
}
inline U32x16 unpack_high_u32(const U32x16& a, const U32x16& b) {
    return each([](auto x, auto y) { return vzip2q_u32(x, y); }, a, b);
}
inline U32x16 unpack_low_u64(const U32x16& a, const U32x16& b) {
    auto unpack = [](auto x, auto y) {
        return vreinterpretq_u32_u64(vzip1q_u64(vreinterpretq_u64_u32(x), vreinterpretq_u64_u32(y)));
    };
    return each(unpack, a, b);
}
inline U32x16 unpack_high_u64(const U32x16& a, const U32x16& b) {
    auto unpack = [](auto x, auto y) {
        return vreinterpretq_u32_u64(vzip2q_u64(vreinterpretq_u64_u32(x), vreinterpretq_u64_u32(y)));
    };
    return each(unpack, a, b);
}
inline U32x16 even_quarters(const U32x16& a, const U32x16& b) { return {{a.q[0], a.q[2], b.q[0], b.q[2]}}; }
inline U32x16 odd_quarters(const U32x16& a, const U32x16& b) { return {{a.q[1], a.q[3], b.q[1], b.q[3]}}; }

// The even lanes of a, then of b, or the odd ones.
inline U32x16 even_lanes(const U32x16& a, const U32x16& b) {
    return {{vuzp1q_u32(a.q[0], a.q[1]), vuzp1q_u32(a.q[2], a.q[3]), vuzp1q_u32(b.q[0], b.q[1]),
             vuzp1q_u32(b.q[2], b.q[3])}};
}
inline U32x16 odd_lanes(const U32x16& a, const U32x16& b) {
    return {{vuzp2q_u32(a.q[0], a.q[1]), vuzp2q_u32(a.q[2], a.q[3]), vuzp2q_u32(b.q[0], b.q[1]),
             vuzp2q_u32(b.q[2], b.q[3])}};
}
inline U32x16 shift_signed(const U32x16& a, int bits) {
    return each([&](auto x) { return vreinterpretq_u32_s32(vreinterpretq_s32_u32(x) >> bits); }, a);
}
inline U32x16 widen_signed(const U16x16& x) {
    auto low = [](uint16x8_t y) { return vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(vreinterpretq_s16_u16(y)))); };
    auto high = [](uint16x8_t y) { return vreinterpretq_u32_s32(vmovl_high_s16(vreinterpretq_s16_u16(y))); };
    return {{low(x.q[0]), high(x.q[0]), low(x.q[1]), high(x.q[1])}};
}

inline F32x16 low_code(const U32x16& x) { return to_f32(x & broadcast_u32(15)); }
inline F32x16 high_code(const U32x16& x) { return low_code(x >> 16); }

// For whole n from -150 to 127. Multiplies by two powers, since 2^n may be denormal.
inline F32x16 scale_by_power(const F32x16& x, const F32x16& n) {
    auto power = [](int32x4_t exponent) {
        return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(exponent, vdupq_n_s32(127)), 23));
    };
    auto scale = [&](float32x4_t y, float32x4_t m) {
        const int32x4_t exponent = vcvtnq_s32_f32(m), half = vshrq_n_s32(exponent, 1);
        return vmulq_f32(vmulq_f32(y, power(half)), power(vsubq_s32(exponent, half)));
    };
    return each(scale, x, n);
}
inline F32x16 round_to_whole(const F32x16& a) {
    return each([](auto x) { return vrndnq_f32(x); }, a);
}
inline F32x16 exponent(const F32x16& x) { return to_f32(as_u32(x) >> 23) - broadcast(127); }
inline F32x16 mantissa(const F32x16& a) {
    auto mantissas = [](float32x4_t x) {
        const uint32x4_t bits = vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x007fffff));
        const float32x4_t m = vreinterpretq_f32_u32(vorrq_u32(bits, vdupq_n_u32(0x3f800000)));
        return vbslq_f32(vcgeq_f32(m, vdupq_n_f32(1.5f)), vmulq_f32(m, vdupq_n_f32(0.5f)), m);
    };
    return each(mantissas, a);
}

// Round to the nearest bf16, ties to even; NaN stays NaN.
inline uint16x8_t to_bf16(float32x4_t low, float32x4_t high) {
    auto rounded = [](float32x4_t x) {  // in the high half of each 32 bits
        const uint32x4_t bits = vreinterpretq_u32_f32(x), is_odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t nearest = vaddq_u32(bits, vaddq_u32(is_odd, vdupq_n_u32(0x7fff)));
        const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x00400000));
        return vreinterpretq_u16_u32(vbslq_u32(vceqq_f32(x, x), nearest, quiet));
    };
    return vuzp2q_u16(rounded(low), rounded(high));
}
inline U16x16 to_bf16(const F32x16& x) { return {{to_bf16(x.q[0], x.q[1]), to_bf16(x.q[2], x.q[3])}}; }

inline F32x16 fmadd_pairs(const U32x16& a, const U32x16& b, const F32x16& c) {
    auto first = [](uint32x4_t x) { return vreinterpretq_f32_u32(vshlq_n_u32(x, 16)); };
    auto second = [](uint32x4_t x) { return vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000))); };
    auto add = [&](uint32x4_t x, uint32x4_t y, float32x4_t sum) {
        return vfmaq_f32(vfmaq_f32(sum, second(x), second(y)), first(x), first(y));
    };
    return each(add, a, b, c);
}

inline void store_interleaved(const U32x16& a, const U32x16& b, void* p) {
    for (int i = 0; i < 4; i++) {
        const uint16x8_t x = vreinterpretq_u16_u32(a.q[i]), y = vreinterpretq_u16_u32(b.q[i]);
        store(static_cast<char*>(p) + 32 * i, U16x16{{vzip1q_u16(x, y), vzip2q_u16(x, y)}});
    }
}
inline Mask16 nonzero_bytes(const void* p) {
    const auto bytes = load_one<uint8x16_t>(p);
    return mask_of(vtstq_u8(bytes, bytes));
}

// There is no AMX. Code that uses it is compiled, but `has_amx` keeps it from running.
template <class... Operands>
inline void _tile_loadconfig(const Operands&...) {
    __builtin_trap();
}
template <class... Operands>
inline void _tile_zero(const Operands&...) {
    __builtin_trap();
}
template <class... Operands>
inline void _tile_loadd(const Operands&...) {
    __builtin_trap();
}
template <class... Operands>
inline void _tile_dpbf16ps(const Operands&...) {
    __builtin_trap();
}
template <class... Operands>
inline void _tile_stored(const Operands&...) {
    __builtin_trap();
}
inline void _tile_release() { __builtin_trap(); }

}  // namespace simd
