// simd.h with AVX2: a vector is two registers.
//
// A product of bf16 pairs is two fused multiplications and additions, first of the second numbers, then of the first
// ones. Every kernel uses this order, so a result's bits depend on the processor, but not on the kernel.
#pragma once
#include <climits>
#include <cstdint>

#include "x86.h"

namespace simd {

constexpr int kSums = 4, kWideSums = 6, kStoredRows = 3;

struct F32x16 {
    __m256 low, high;
};
struct F64x8 {
    __m256d low, high;
};
struct U32x16 {
    __m256i low, high;
};
using U16x16 = __m256i;

inline F32x16 load(const void* p) {
    return {_mm256_loadu_ps(static_cast<const float*>(p)), _mm256_loadu_ps(static_cast<const float*>(p) + 8)};
}
inline void store(void* p, const F32x16& a) {
    _mm256_storeu_ps(static_cast<float*>(p), a.low);
    _mm256_storeu_ps(static_cast<float*>(p) + 8, a.high);
}
inline U32x16 load_u32(const void* p) {
    return {_mm256_loadu_si256(static_cast<const __m256i*>(p)), _mm256_loadu_si256(static_cast<const __m256i*>(p) + 1)};
}
inline void store(void* p, const U32x16& a) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), a.low);
    _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, a.high);
}
inline U16x16 load_u16(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, U16x16 x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline void store_lines(const char** p, const char* first) {
    const __m256i address = _mm256_set1_epi64x(reinterpret_cast<long long>(first));
    store(p, U32x16{_mm256_add_epi64(address, _mm256_setr_epi64x(0, 64, 128, 192)),
                    _mm256_add_epi64(address, _mm256_setr_epi64x(256, 320, 384, 448))});
}
inline F32x16 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline U32x16 broadcast_u32(uint32_t x) {
    const __m256i all = _mm256_set1_epi32(static_cast<int>(x));
    return {all, all};
}
inline U32x16 lane_numbers() {
    return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}

inline F32x16 operator+(const F32x16& a, const F32x16& b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline F32x16 operator-(const F32x16& a, const F32x16& b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
inline F32x16 operator*(const F32x16& a, const F32x16& b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline F32x16 operator/(const F32x16& a, const F32x16& b) {
    return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
inline F32x16 min(const F32x16& a, const F32x16& b) {
    return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
inline F32x16 max(const F32x16& a, const F32x16& b) {
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline F32x16 fmadd(const F32x16& a, const F32x16& b, const F32x16& c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline F32x16 fnmadd(const F32x16& a, const F32x16& b, const F32x16& c) {
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline F64x8 operator+(const F64x8& a, const F64x8& b) {
    return {_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)};
}
inline F64x8 widen(__m256 x) {
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
}
inline F64x8 widen_low(const F32x16& x) { return widen(x.low); }
inline F64x8 widen_high(const F32x16& x) { return widen(x.high); }
inline double reduce_add(const F64x8& a) {
    const __m256d all = _mm256_add_pd(a.low, a.high);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(all), _mm256_extractf128_pd(all, 1));
    return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}
template <class Function>
inline float reduce(Function combine, const F32x16& a) {
    float x[16];
    store(x, a);
    for (int count = 8; count > 0; count /= 2)
        for (int i = 0; i < count; i++) x[i] = combine(x[i], x[i + count]);
    return x[0];
}
inline float reduce_add(const F32x16& a) {
    return reduce([](float x, float y) { return x + y; }, a);
}
inline float reduce_max(const F32x16& a) {
    return reduce([](float x, float y) { return x > y ? x : y; }, a);
}

// Functions with masks. AVX2 has no mask registers: a mask is expanded to all bits of its lanes.
inline __m256i lanes(unsigned mask) {  // of the lowest eight bits
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bits), bits);
}
inline U32x16 all_lanes(Mask16 mask) { return {lanes(mask), lanes(mask >> 8)}; }
inline F32x16 choose(Mask16 mask, const F32x16& a, const F32x16& otherwise) {
    const U32x16 chosen = all_lanes(mask);
    return {_mm256_blendv_ps(otherwise.low, a.low, _mm256_castsi256_ps(chosen.low)),
            _mm256_blendv_ps(otherwise.high, a.high, _mm256_castsi256_ps(chosen.high))};
}
inline U32x16 choose(Mask16 mask, const U32x16& a, const U32x16& otherwise) {
    const U32x16 chosen = all_lanes(mask);
    return {_mm256_blendv_epi8(otherwise.low, a.low, chosen.low),
            _mm256_blendv_epi8(otherwise.high, a.high, chosen.high)};
}
template <int predicate>
inline Mask16 compare(const F32x16& a, const F32x16& b) {
    return static_cast<Mask16>(_mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, predicate)) |
                               _mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, predicate)) << 8);
}
inline Mask16 is_less(const F32x16& a, const F32x16& b) { return compare<_CMP_LT_OQ>(a, b); }
inline Mask16 is_less(const U32x16& a, const U32x16& b) {
    auto compare = [](__m256i x, __m256i y) {
        return _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(y, x)));
    };
    return static_cast<Mask16>(compare(a.low, b.low) | compare(a.high, b.high) << 8);
}
inline Mask16 is_greater(const F32x16& a, const F32x16& b) { return compare<_CMP_GT_OQ>(a, b); }
inline Mask16 is_at_least(const F32x16& a, const F32x16& b) { return compare<_CMP_GE_OQ>(a, b); }
inline Mask16 is_equal(const F32x16& a, const F32x16& b) { return compare<_CMP_EQ_OQ>(a, b); }
inline Mask16 is_nan(const F32x16& x) { return compare<_CMP_UNORD_Q>(x, x); }
inline U32x16 load_lanes(Mask16 mask, const void* p) {
    const U32x16 chosen = all_lanes(mask);
    return {_mm256_maskload_epi32(static_cast<const int*>(p), chosen.low),
            _mm256_maskload_epi32(static_cast<const int*>(p) + 8, chosen.high)};
}
inline void store_lanes(void* p, Mask16 mask, const U32x16& a) {
    const U32x16 chosen = all_lanes(mask);
    _mm256_maskstore_epi32(static_cast<int*>(p), chosen.low, a.low);
    _mm256_maskstore_epi32(static_cast<int*>(p) + 8, chosen.high, a.high);
}
inline void store_lanes(void* p, Mask16 mask, const F32x16& a) {
    store_lanes(p, mask, U32x16{_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)});
}
inline void store_lanes(void* p, Mask16 mask, U16x16 x) {
    uint16_t all[16];
    store(all, x);
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) static_cast<uint16_t*>(p)[i] = all[i];
}
inline int reduce_min(Mask16 mask, const U32x16& a) {
    int x[16], found = INT_MAX;
    store(x, a);
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1 && x[i] < found) found = x[i];
    return found;
}

inline F32x16 as_f32(const U32x16& a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
inline U32x16 as_u32(const F32x16& a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
inline F32x16 to_f32(const U32x16& a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
inline U32x16 widen(U16x16 x) {
    return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1))};
}
inline F32x16 from_f16(U16x16 x) {  // fp16 numbers
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
}

inline U32x16 operator+(const U32x16& a, const U32x16& b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
inline U32x16 operator*(const U32x16& a, const U32x16& b) {
    return {_mm256_mullo_epi32(a.low, b.low), _mm256_mullo_epi32(a.high, b.high)};
}
inline U32x16 operator&(const U32x16& a, const U32x16& b) {
    return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)};
}
inline U32x16 operator|(const U32x16& a, const U32x16& b) {
    return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
}
inline U32x16 operator^(const U32x16& a, const U32x16& b) {
    return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)};
}
inline U32x16 operator<<(const U32x16& a, int bits) {
    return {_mm256_slli_epi32(a.low, bits), _mm256_slli_epi32(a.high, bits)};
}
inline U32x16 operator>>(const U32x16& a, int bits) {
    return {_mm256_srli_epi32(a.low, bits), _mm256_srli_epi32(a.high, bits)};
}

// Unpack within each 128 bits.
inline U32x16 unpack_low_u32(const U32x16& a, const U32x16& b) {
    return {_mm256_unpacklo_epi32(a.low, b.low), _mm256_unpacklo_epi32(a.high, b.high)};
}
inline U32x16 unpack_high_u32(const U32x16& a, const U32x16& b) {
    return {_mm256_unpackhi_epi32(a.low, b.low), _mm256_unpackhi_epi32(a.high, b.high)};
}
inline U32x16 unpack_low_u64(const U32x16& a, const U32x16& b) {
    return {_mm256_unpacklo_epi64(a.low, b.low), _mm256_unpacklo_epi64(a.high, b.high)};
}
inline U32x16 unpack_high_u64(const U32x16& a, const U32x16& b) {
    return {_mm256_unpackhi_epi64(a.low, b.low), _mm256_unpackhi_epi64(a.high, b.high)};
}
inline U32x16 even_quarters(const U32x16& a, const U32x16& b) {
    return {_mm256_permute2x128_si256(a.low, a.high, 0x20), _mm256_permute2x128_si256(b.low, b.high, 0x20)};
}
inline U32x16 odd_quarters(const U32x16& a, const U32x16& b) {
    return {_mm256_permute2x128_si256(a.low, a.high, 0x31), _mm256_permute2x128_si256(b.low, b.high, 0x31)};
}

inline void store_interleaved(const U32x16& a, const U32x16& b, void* p) {
    auto interleave = [](__m256i x, __m256i y) {
        const __m256i low = _mm256_unpacklo_epi16(x, y), high = _mm256_unpackhi_epi16(x, y);
        return U32x16{_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)};
    };
    store(p, interleave(a.low, b.low));
    store(static_cast<char*>(p) + 64, interleave(a.high, b.high));
}

inline F32x16 low_code(const U32x16& x) { return to_f32(x & broadcast_u32(15)); }
inline F32x16 high_code(const U32x16& x) { return low_code(x >> 16); }

// For whole n from -150 to 127. Multiplies by two powers, since 2^n may be denormal.
inline F32x16 scale_by_power(const F32x16& x, const F32x16& n) {
    auto power = [](__m256i exponent) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
    };
    auto scale = [&](__m256 x, __m256 n) {
        const __m256i exponent = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(exponent, 1);
        return _mm256_mul_ps(_mm256_mul_ps(x, power(half)), power(_mm256_sub_epi32(exponent, half)));
    };
    return {scale(x.low, n.low), scale(x.high, n.high)};
}
inline F32x16 round_to_whole(const F32x16& x) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, kNearest), _mm256_round_ps(x.high, kNearest)};
}
inline F32x16 exponent(const F32x16& x) { return to_f32(as_u32(x) >> 23) - broadcast(127); }
inline F32x16 mantissa(const F32x16& x) {
    const F32x16 m = as_f32((as_u32(x) & broadcast_u32(0x007fffff)) | broadcast_u32(0x3f800000));
    return choose(is_at_least(m, broadcast(1.5f)), m * broadcast(0.5f), m);
}

// The even lanes of a, then of b, or the odd ones.
inline __m256i in_order(__m256 x) { return _mm256_permute4x64_epi64(_mm256_castps_si256(x), 0xd8); }
template <int selector>
inline __m256i select_lanes(const U32x16& x) {
    return in_order(_mm256_shuffle_ps(_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high), selector));
}
inline U32x16 even_lanes(const U32x16& a, const U32x16& b) { return {select_lanes<0x88>(a), select_lanes<0x88>(b)}; }
inline U32x16 odd_lanes(const U32x16& a, const U32x16& b) { return {select_lanes<0xdd>(a), select_lanes<0xdd>(b)}; }
inline U32x16 shift_signed(const U32x16& a, int bits) {
    return {_mm256_srai_epi32(a.low, bits), _mm256_srai_epi32(a.high, bits)};
}
inline U32x16 widen_signed(U16x16 x) {
    return {_mm256_cvtepi16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepi16_epi32(_mm256_extracti128_si256(x, 1))};
}

// Round to the nearest bf16, ties to even, in the high half of each 32 bits.
inline __m256i round_number(__m256i bits) {  // of a number other than NaN
    const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff)));
}
inline __m256i round_any(__m256 x) {  // NaN stays NaN
    const __m256i bits = _mm256_castps_si256(x), quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    return _mm256_blendv_epi8(round_number(bits), quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
inline __m256i high_halves(__m256i a, __m256i b) {  // of each 32 bits
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16)), 0xd8);
}
inline U16x16 to_bf16(const F32x16& x) { return high_halves(round_any(x.low), round_any(x.high)); }

inline __m256 fmadd_pairs(__m256i a, __m256i b, __m256 c) {
    const __m256i second = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    c = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(a, second)),
                        _mm256_castsi256_ps(_mm256_and_si256(b, second)), c);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)),
                           c);
}
inline F32x16 fmadd_pairs(const U32x16& a, const U32x16& b, const F32x16& c) {
    return {fmadd_pairs(a.low, b.low, c.low), fmadd_pairs(a.high, b.high, c.high)};
}

}  // namespace simd
