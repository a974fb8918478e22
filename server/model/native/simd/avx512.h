// simd.h with AVX-512. F32x16 is the compiler's own vector type, which has operators. A product of bf16 pairs is an
// instruction of AVX-512-BF16; without it, two fused multiplications and additions.
#pragma once
#include "x86.h"

namespace simd {

constexpr int kSums = 24, kWideSums = 0;
#ifdef __AVX512BF16__
constexpr int kStoredRows = 10;
#else
constexpr int kStoredRows = 4;
#endif

using F32x16 = __m512;
using F64x8 = __m512d;
using U16x16 = __m256i;
struct U32x16 {  // a class, since GCC merges shifts of its own vector type, and then needs more registers
    __m512i bits;
};

inline F32x16 load(const void* p) { return _mm512_loadu_ps(p); }
inline U32x16 load_u32(const void* p) { return {_mm512_loadu_si512(p)}; }
inline U16x16 load_u16(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline U32x16 load_lanes(Mask16 mask, const void* p) { return {_mm512_maskz_loadu_epi32(mask, p)}; }
inline void store(void* p, F32x16 x) { _mm512_storeu_ps(p, x); }
inline void store(void* p, U32x16 x) { _mm512_storeu_si512(p, x.bits); }
inline void store(void* p, U16x16 x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline void store_lanes(void* p, Mask16 mask, F32x16 x) { _mm512_mask_storeu_ps(p, mask, x); }
inline void store_lanes(void* p, Mask16 mask, U32x16 x) { _mm512_mask_storeu_epi32(p, mask, x.bits); }
inline void store_lanes(void* p, Mask16 mask, U16x16 x) { _mm256_mask_storeu_epi16(p, mask, x); }
inline void store_interleaved(U32x16 a, U32x16 b, void* p) {
    alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    _mm512_storeu_si512(p, _mm512_permutex2var_epi16(a.bits, low, b.bits));
    _mm512_storeu_si512(static_cast<char*>(p) + 64, _mm512_permutex2var_epi16(a.bits, high, b.bits));
}

inline void store_lines(const char** p, const char* first) {
    const __m512i offsets = _mm512_setr_epi64(0, 64, 128, 192, 256, 320, 384, 448);
    _mm512_storeu_si512(p, _mm512_add_epi64(_mm512_set1_epi64(reinterpret_cast<long long>(first)), offsets));
}

inline F32x16 broadcast(float x) { return _mm512_set1_ps(x); }
inline U32x16 broadcast_u32(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
inline U32x16 lane_numbers() { return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }

inline U32x16 operator+(U32x16 a, U32x16 b) { return {_mm512_add_epi32(a.bits, b.bits)}; }
inline U32x16 operator*(U32x16 a, U32x16 b) { return {_mm512_mullo_epi32(a.bits, b.bits)}; }
inline U32x16 operator&(U32x16 a, U32x16 b) { return {_mm512_and_si512(a.bits, b.bits)}; }
inline U32x16 operator|(U32x16 a, U32x16 b) { return {_mm512_or_si512(a.bits, b.bits)}; }
inline U32x16 operator^(U32x16 a, U32x16 b) { return {_mm512_xor_si512(a.bits, b.bits)}; }
inline U32x16 operator<<(U32x16 a, int count) { return {_mm512_slli_epi32(a.bits, count)}; }
inline U32x16 operator>>(U32x16 a, int count) { return {_mm512_srli_epi32(a.bits, count)}; }

inline F32x16 fmadd(F32x16 a, F32x16 b, F32x16 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32x16 fnmadd(F32x16 a, F32x16 b, F32x16 c) { return _mm512_fnmadd_ps(a, b, c); }
inline F32x16 min(F32x16 a, F32x16 b) { return _mm512_min_ps(a, b); }
inline F32x16 max(F32x16 a, F32x16 b) { return _mm512_max_ps(a, b); }
inline float reduce_add(F32x16 x) { return _mm512_reduce_add_ps(x); }
inline double reduce_add(F64x8 x) { return _mm512_reduce_add_pd(x); }
inline float reduce_max(F32x16 x) { return _mm512_reduce_max_ps(x); }
inline int reduce_min(Mask16 mask, U32x16 x) { return _mm512_mask_reduce_min_epi32(mask, x.bits); }

inline F32x16 choose(Mask16 mask, F32x16 a, F32x16 b) { return _mm512_mask_mov_ps(b, mask, a); }
inline U32x16 choose(Mask16 mask, U32x16 a, U32x16 b) { return {_mm512_mask_mov_epi32(b.bits, mask, a.bits)}; }
inline Mask16 is_less(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask16 is_less(U32x16 a, U32x16 b) { return _mm512_cmplt_epi32_mask(a.bits, b.bits); }
inline Mask16 is_greater(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask16 is_at_least(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Mask16 is_equal(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Mask16 is_nan(F32x16 x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }

inline F32x16 as_f32(U32x16 x) { return _mm512_castsi512_ps(x.bits); }
inline U32x16 as_u32(F32x16 x) { return {_mm512_castps_si512(x)}; }
inline F32x16 to_f32(U32x16 x) { return _mm512_cvtepi32_ps(x.bits); }
inline U32x16 widen(U16x16 x) { return {_mm512_cvtepu16_epi32(x)}; }
inline F64x8 widen_low(F32x16 x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
inline F64x8 widen_high(F32x16 x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }

inline U32x16 unpack_low_u32(U32x16 a, U32x16 b) { return {_mm512_unpacklo_epi32(a.bits, b.bits)}; }
inline U32x16 unpack_high_u32(U32x16 a, U32x16 b) { return {_mm512_unpackhi_epi32(a.bits, b.bits)}; }
inline U32x16 unpack_low_u64(U32x16 a, U32x16 b) { return {_mm512_unpacklo_epi64(a.bits, b.bits)}; }
inline U32x16 unpack_high_u64(U32x16 a, U32x16 b) { return {_mm512_unpackhi_epi64(a.bits, b.bits)}; }
inline U32x16 even_quarters(U32x16 a, U32x16 b) { return {_mm512_shuffle_i32x4(a.bits, b.bits, 0x88)}; }
inline U32x16 odd_quarters(U32x16 a, U32x16 b) { return {_mm512_shuffle_i32x4(a.bits, b.bits, 0xdd)}; }

inline F32x16 round_to_whole(F32x16 x) { return _mm512_roundscale_ps(x, 0); }
inline F32x16 scale_by_power(F32x16 x, F32x16 n) { return _mm512_scalef_ps(x, n); }
inline F32x16 exponent(F32x16 x) { return _mm512_getexp_ps(x); }
inline F32x16 mantissa(F32x16 x) { return _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero); }

// A permutation uses only the lowest four bits of a 32-bit index, or five of a 16-bit index. The table repeats after 16
// entries, so the fifth bit doesn't matter. The upper half of a float is its bf16.
inline F32x16 low_code(U32x16 x) {
    return _mm512_permutexvar_ps(x.bits, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}
inline F32x16 high_code(U32x16 x) {
    alignas(64) static constexpr uint16_t kCodes[32] = {0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                                        0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170,
                                                        0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                                        0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, x.bits, _mm512_load_si512(kCodes)));
}

#ifdef __AVX512BF16__
inline U16x16 to_bf16(F32x16 x) { return reinterpret_cast<U16x16>(_mm512_cvtneps_pbh(x)); }
inline U32x16 to_bf16(F32x16 high, F32x16 low) { return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low))}; }
inline F32x16 fmadd_pairs(U32x16 a, U32x16 b, F32x16 c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a.bits), reinterpret_cast<__m512bh>(b.bits));
}
#else
inline U32x16 round_to_bf16(F32x16 x) {  // in the low half of each 32 bits
    const U32x16 bits = as_u32(x), is_odd = (bits >> 16) & broadcast_u32(1);
    const U32x16 rounded = bits + (is_odd + broadcast_u32(0x7fff)), quiet = bits | broadcast_u32(0x00400000);
    return choose(is_nan(x), quiet, rounded) >> 16;
}
inline U16x16 to_bf16(F32x16 x) { return _mm512_cvtepi32_epi16(round_to_bf16(x).bits); }
inline U32x16 to_bf16(F32x16 high, F32x16 low) {
    return {_mm512_inserti64x4(_mm512_castsi256_si512(to_bf16(low)), to_bf16(high), 1)};
}
inline F32x16 fmadd_pairs(U32x16 a, U32x16 b, F32x16 c) {
    const U32x16 second = broadcast_u32(0xffff0000);
    c = fmadd(as_f32(a & second), as_f32(b & second), c);
    return fmadd(as_f32(a << 16), as_f32(b << 16), c);
}
#endif

}  // namespace simd
