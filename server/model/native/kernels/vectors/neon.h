// What the kernels use of AVX-512, made of four registers of 64-bit Arm's Advanced SIMD each: memory, arithmetic and
// masks.
//
// Nothing beyond ARMv8-A is used. What isn't a number stays so in minima and maxima, where x86 takes the second of
// both.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

enum Comparison { _CMP_EQ_OQ, _CMP_GE_OQ, _CMP_GT_OQ, _CMP_LT_OQ, _CMP_UNORD_Q };  // as x86 calls them

namespace vectors {

constexpr int kSums = 5, kWideSums = 0, kStoredRows = 3;

template <class Quarter>
struct Four {
    Quarter q[4];
};
template <class Half>
struct Two {
    Half q[2];
};
using Floats = Four<float32x4_t>;   // 16
using Doubles = Four<float64x2_t>;  // 8
using Words = Four<uint32x4_t>;     // 512 bits
using Shorts = Two<uint16x8_t>;     // 16

// What `of` makes of each quarter of the vectors.
template <class Operation, class... Vectors>
[[gnu::always_inline]] inline auto each(Operation of, const Vectors&... v) {
    return Four<decltype(of(v.q[0]...))>{{of(v.q[0]...), of(v.q[1]...), of(v.q[2]...), of(v.q[3]...)}};
}

template <class Register>
inline Register load_one(const void* p, int index = 0) {
    return (Register)vld1q_u8((const uint8_t*)p + 16 * index);  // bytes may be of any type
}
template <class Register>
inline void store_one(void* p, const Register& x, int index = 0) {
    vst1q_u8((uint8_t*)p + 16 * index, (uint8x16_t)x);
}
template <class Quarter>
inline Four<Quarter> load_four(const void* p) {
    return {{load_one<Quarter>(p, 0), load_one<Quarter>(p, 1), load_one<Quarter>(p, 2), load_one<Quarter>(p, 3)}};
}
inline Floats load(const void* p) { return load_four<float32x4_t>(p); }
inline Words load_words(const void* p) { return load_four<uint32x4_t>(p); }
inline Shorts load_shorts(const void* p) { return {{load_one<uint16x8_t>(p, 0), load_one<uint16x8_t>(p, 1)}}; }
inline void store(void* p, const Shorts& x) { store_one(p, x.q[0]), store_one(p, x.q[1], 1); }
template <class Quarter>
inline void store(void* p, const Four<Quarter>& x) {
    store_one(p, x.q[0]), store_one(p, x.q[1], 1), store_one(p, x.q[2], 2), store_one(p, x.q[3], 3);
}
inline Floats set(float x) {
    const float32x4_t all = vdupq_n_f32(x);
    return {{all, all, all, all}};
}
inline Words set_words(int x) {
    const uint32x4_t all = vdupq_n_u32((uint32_t)x);
    return {{all, all, all, all}};
}
template <class... Numbers>
inline Words words_of(Numbers... numbers) {
    const int all[] = {numbers...};
    return load_words(all);
}
template <class... Numbers>
inline Words longs_of(Numbers... numbers) {
    const long long all[] = {numbers...};
    return load_words(all);
}

template <class Quarter>
inline Four<Quarter> add(const Four<Quarter>& a, const Four<Quarter>& b) {
    return each([](auto x, auto y) { return x + y; }, a, b);
}
inline Floats subtract(const Floats& a, const Floats& b) {
    return each([](auto x, auto y) { return x - y; }, a, b);
}
template <class Quarter>
inline Four<Quarter> multiply(const Four<Quarter>& a, const Four<Quarter>& b) {
    return each([](auto x, auto y) { return x * y; }, a, b);
}
inline Floats divide(const Floats& a, const Floats& b) {
    return each([](auto x, auto y) { return x / y; }, a, b);
}
inline Floats least(const Floats& a, const Floats& b) {
    return each([](auto x, auto y) { return vminq_f32(x, y); }, a, b);
}
inline Floats most(const Floats& a, const Floats& b) {
    return each([](auto x, auto y) { return vmaxq_f32(x, y); }, a, b);
}
inline Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
    return each([](auto x, auto y, auto z) { return vfmaq_f32(z, x, y); }, a, b, c);
}
inline Floats subtract_product(const Floats& a, const Floats& b, const Floats& c) {
    return each([](auto x, auto y, auto z) { return vfmsq_f32(z, x, y); }, a, b, c);
}
inline Two<float32x4_t> low_half(const Floats& a) { return {{a.q[0], a.q[1]}}; }
inline Two<float32x4_t> high_half(const Floats& a) { return {{a.q[2], a.q[3]}}; }
inline Doubles widen(const Two<float32x4_t>& x) {
    return {{vcvt_f64_f32(vget_low_f32(x.q[0])), vcvt_high_f64_f32(x.q[0]), vcvt_f64_f32(vget_low_f32(x.q[1])),
             vcvt_high_f64_f32(x.q[1])}};
}
inline double sum(const Doubles& a) {  // always of those that lie half apart, as avx2.h has it
    return vaddvq_f64(vaddq_f64(vaddq_f64(a.q[0], a.q[2]), vaddq_f64(a.q[1], a.q[3])));
}
inline float sum(const Floats& a) {
    const float32x4_t four = vaddq_f32(vaddq_f32(a.q[0], a.q[2]), vaddq_f32(a.q[1], a.q[3]));
    return vaddv_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
}
inline float greatest(const Floats& a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.q[0], a.q[1]), vmaxq_f32(a.q[2], a.q[3])));
}

// Masks: bit i is lane i's.
inline uint16_t mask_of(uint8x16_t is_set) {  // of bytes that are all ones or zero
    static constexpr uint8_t kBits[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t bits = vandq_u8(is_set, vld1q_u8(kBits));
    return (uint16_t)(vaddv_u8(vget_low_u8(bits)) | vaddv_u8(vget_high_u8(bits)) << 8);
}
inline uint16_t mask_of(const Words& is_set) {
    auto narrow = [](uint32x4_t low, uint32x4_t high) {
        return vreinterpretq_u8_u16(vuzp1q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high)));
    };
    return mask_of(vuzp1q_u8(narrow(is_set.q[0], is_set.q[1]), narrow(is_set.q[2], is_set.q[3])));
}
inline Words all_lanes(uint16_t mask) {
    const Words bits = words_of(1, 2, 4, 8, 1 << 4, 1 << 5, 1 << 6, 1 << 7, 1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12,
                                1 << 13, 1 << 14, 1 << 15);
    return each([](auto x, auto y) { return vtstq_u32(x, y); }, set_words(mask), bits);
}
inline Floats choose(uint16_t mask, const Floats& a, const Floats& otherwise) {
    return each([](auto of, auto x, auto y) { return vbslq_f32(of, x, y); }, all_lanes(mask), a, otherwise);
}
inline Words choose(uint16_t mask, const Words& a, const Words& otherwise) {
    return each([](auto of, auto x, auto y) { return vbslq_u32(of, x, y); }, all_lanes(mask), a, otherwise);
}
template <Comparison comparison>
inline uint16_t compare(const Floats& a, const Floats& b) {
    return mask_of(each(
        [](auto x, auto y) {
            if constexpr (comparison == _CMP_EQ_OQ) return vceqq_f32(x, y);
            if constexpr (comparison == _CMP_GE_OQ) return vcgeq_f32(x, y);
            if constexpr (comparison == _CMP_GT_OQ) return vcgtq_f32(x, y);
            if constexpr (comparison == _CMP_LT_OQ) return vcltq_f32(x, y);
            if constexpr (comparison == _CMP_UNORD_Q) return vmvnq_u32(vandq_u32(vceqq_f32(x, x), vceqq_f32(y, y)));
        },
        a, b));
}
// A register's lanes of which the lowest bits of the mask are set; other memory isn't touched.
inline uint32x4_t load_quarter(unsigned mask, const uint32_t* p) {
    if ((mask & 15) == 15) return load_one<uint32x4_t>(p);
    uint32_t all[4] = {};
    for (int i = 0; i < 4; i++)
        if (mask >> i & 1) memcpy(&all[i], p + i, 4);
    return load_one<uint32x4_t>(all);
}
template <class Lane, class Register>
inline void store_lanes(Lane* p, unsigned mask, Register x) {
    constexpr int kLanes = 16 / sizeof(Lane), kAll = (1 << kLanes) - 1;
    if ((mask & kAll) == kAll) return store_one(p, x);
    Lane all[kLanes];
    store_one(all, x);
    for (int i = 0; i < kLanes; i++)
        if (mask >> i & 1) memcpy(p + i, &all[i], sizeof(Lane));
}
inline Words load_some(uint16_t mask, const void* p) {
    auto of = [&](int i) { return load_quarter(mask >> 4 * i, (const uint32_t*)p + 4 * i); };
    return {{of(0), of(1), of(2), of(3)}};
}
template <class Quarter>
inline void store_some(void* p, uint16_t mask, const Four<Quarter>& x) {
    for (int i = 0; i < 4; i++) store_lanes((uint32_t*)p + 4 * i, mask >> 4 * i, x.q[i]);
}
inline void store_some(void* p, uint16_t mask, const Shorts& x) {
    for (int i = 0; i < 2; i++) store_lanes((uint16_t*)p + 8 * i, mask >> 8 * i, x.q[i]);
}

}  // namespace vectors
