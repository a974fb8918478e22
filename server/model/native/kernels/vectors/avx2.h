// What the kernels use of AVX-512, under the same names, made of pairs of AVX2's registers: for processors without it.
//
// Products of 16-bit pairs are two fused multiplications and additions each, of the second numbers and then of the
// first: every kernel sums up alike, so that bits depend on the processor, but not on which kernel computes a number.
#pragma once
#include <climits>
#include <cstdint>

#include "x86.h"

namespace vectors {

constexpr int kSums = 4, kWideSums = 6, kStoredRows = 3;

struct Floats {  // 16
    __m256 low, high;
};
struct Doubles {  // 8
    __m256d low, high;
};
struct Words {  // 512 bits
    __m256i low, high;
};

inline Floats load(const void* p) { return {_mm256_loadu_ps((const float*)p), _mm256_loadu_ps((const float*)p + 8)}; }
inline void store(void* p, const Floats& a) {
    _mm256_storeu_ps((float*)p, a.low), _mm256_storeu_ps((float*)p + 8, a.high);
}
inline Words load_words(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
inline void store(void* p, const Words& a) {
    _mm256_storeu_si256((__m256i*)p, a.low), _mm256_storeu_si256((__m256i*)p + 1, a.high);
}
inline Floats set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Words set_words(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
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

inline Floats add(const Floats& a, const Floats& b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
inline Floats subtract(const Floats& a, const Floats& b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
inline Floats multiply(const Floats& a, const Floats& b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Floats divide(const Floats& a, const Floats& b) {
    return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
inline Floats least(const Floats& a, const Floats& b) {
    return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
inline Floats most(const Floats& a, const Floats& b) {
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats subtract_product(const Floats& a, const Floats& b, const Floats& c) {
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Doubles add(const Doubles& a, const Doubles& b) {
    return {_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)};
}
inline __m256 low_half(const Floats& a) { return a.low; }
inline __m256 high_half(const Floats& a) { return a.high; }
inline Doubles widen(__m256 x) {
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
}
inline double sum(const Doubles& a) {
    const __m256d all = _mm256_add_pd(a.low, a.high);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(all), _mm256_extractf128_pd(all, 1));
    return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}
template <class Function>
inline float reduce(Function of, const Floats& a) {
    float x[16];
    store(x, a);
    for (int count = 8; count > 0; count /= 2)
        for (int i = 0; i < count; i++) x[i] = of(x[i], x[i + count]);
    return x[0];
}
inline float sum(const Floats& a) {
    return reduce([](float x, float y) { return x + y; }, a);
}
inline float greatest(const Floats& a) {
    return reduce([](float x, float y) { return x > y ? x : y; }, a);
}

// Masks: bit i is lane i's.
inline __m256i lanes(unsigned mask) {  // of the lowest eight
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)mask), bits), bits);
}
inline Words all_lanes(__mmask16 mask) { return {lanes(mask), lanes(mask >> 8)}; }
inline Floats choose(__mmask16 mask, const Floats& a, const Floats& otherwise) {
    const Words of = all_lanes(mask);
    return {_mm256_blendv_ps(otherwise.low, a.low, _mm256_castsi256_ps(of.low)),
            _mm256_blendv_ps(otherwise.high, a.high, _mm256_castsi256_ps(of.high))};
}
inline Words choose(__mmask16 mask, const Words& a, const Words& otherwise) {
    const Words of = all_lanes(mask);
    return {_mm256_blendv_epi8(otherwise.low, a.low, of.low), _mm256_blendv_epi8(otherwise.high, a.high, of.high)};
}
template <int predicate>
inline __mmask16 compare(const Floats& a, const Floats& b) {
    return (__mmask16)(_mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, predicate)) |
                       _mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, predicate)) << 8);
}
inline Words load_some(__mmask16 mask, const void* p) {
    const Words of = all_lanes(mask);
    return {_mm256_maskload_epi32((const int*)p, of.low), _mm256_maskload_epi32((const int*)p + 8, of.high)};
}
inline void store_some(void* p, __mmask16 mask, const Words& a) {
    const Words of = all_lanes(mask);
    _mm256_maskstore_epi32((int*)p, of.low, a.low), _mm256_maskstore_epi32((int*)p + 8, of.high, a.high);
}
inline void store_some(void* p, __mmask16 mask, __m256i numbers) {  // of 16 bits
    uint16_t all[16];
    _mm256_storeu_si256((__m256i*)all, numbers);
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) ((uint16_t*)p)[i] = all[i];
}
inline int least_of(__mmask16 mask, const Words& a) {
    int x[16], found = INT_MAX;
    store(x, a);
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1 && x[i] < found) found = x[i];
    return found;
}

inline Floats as_floats(const Words& a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
inline Words as_words(const Floats& a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
inline Floats to_floats(const Words& a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
inline Words to_words(const Floats& a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
inline Words widen_unsigned(__m256i x) {  // 16 numbers of 16 bits
    return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1))};
}
inline Floats from_halfs(__m256i x) {  // 16 of fp16
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
}

inline Words add(const Words& a, const Words& b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
inline Words add_longs(const Words& a, const Words& b) {
    return {_mm256_add_epi64(a.low, b.low), _mm256_add_epi64(a.high, b.high)};
}
inline Words multiply(const Words& a, const Words& b) {
    return {_mm256_mullo_epi32(a.low, b.low), _mm256_mullo_epi32(a.high, b.high)};
}
inline Words operator&(const Words& a, const Words& b) {
    return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)};
}
inline Words operator|(const Words& a, const Words& b) {
    return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
}
inline Words operator^(const Words& a, const Words& b) {
    return {_mm256_xor_si256(a.low, b.low), _mm256_xor_si256(a.high, b.high)};
}
inline Words left(const Words& a, int bits) {
    return {_mm256_slli_epi32(a.low, bits), _mm256_slli_epi32(a.high, bits)};
}
inline Words right(const Words& a, int bits) {
    return {_mm256_srli_epi32(a.low, bits), _mm256_srli_epi32(a.high, bits)};
}

// Of each 128 bits of both, as AVX-512 has them.
inline Words unpack_low_words(const Words& a, const Words& b) {
    return {_mm256_unpacklo_epi32(a.low, b.low), _mm256_unpacklo_epi32(a.high, b.high)};
}
inline Words unpack_high_words(const Words& a, const Words& b) {
    return {_mm256_unpackhi_epi32(a.low, b.low), _mm256_unpackhi_epi32(a.high, b.high)};
}
inline Words unpack_low_longs(const Words& a, const Words& b) {
    return {_mm256_unpacklo_epi64(a.low, b.low), _mm256_unpacklo_epi64(a.high, b.high)};
}
inline Words unpack_high_longs(const Words& a, const Words& b) {
    return {_mm256_unpackhi_epi64(a.low, b.low), _mm256_unpackhi_epi64(a.high, b.high)};
}
template <int which>
inline Words quarters(const Words& a, const Words& b) {  // the even or the odd ones, a's first
    static_assert(which == 0x88 || which == 0xdd);
    constexpr int kHalves = which == 0x88 ? 0x20 : 0x31;
    return {_mm256_permute2x128_si256(a.low, a.high, kHalves), _mm256_permute2x128_si256(b.low, b.high, kHalves)};
}

// Two rows of 32 numbers of 16 bits side by side.
inline void store_interleaved(const Words& a, const Words& b, uint32_t* to) {
    auto one = [](__m256i x, __m256i y) {
        const __m256i low = _mm256_unpacklo_epi16(x, y), high = _mm256_unpackhi_epi16(x, y);
        return Words{_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)};
    };
    store(to, one(a.low, b.low)), store(to + 16, one(a.high, b.high));
}

inline Floats low_code(const Words& x) { return to_floats(x & set_words(15)); }
inline Floats high_code(const Words& x) { return low_code(right(x, 16)); }

// 2^n · x, for whole n from -150 to 127.
inline Floats scale(const Floats& x, const Floats& n) {
    auto power = [](__m256i exponent) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
    };
    auto one = [&](__m256 of, __m256 by) {
        const __m256i exponent = _mm256_cvtps_epi32(by), half = _mm256_srai_epi32(exponent, 1);
        return _mm256_mul_ps(_mm256_mul_ps(of, power(half)), power(_mm256_sub_epi32(exponent, half)));
    };
    return {one(x.low, n.low), one(x.high, n.high)};
}
inline Floats round(const Floats& x) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, kNearest), _mm256_round_ps(x.high, kNearest)};
}
// Of positive normal numbers: 2^exponent · mantissa, 1 ≤ mantissa < 2, which is halved from 1.5 on.
inline Floats exponent(const Floats& x) { return subtract(to_floats(right(as_words(x), 23)), set(127)); }
inline Floats mantissa(const Floats& x) {
    const Floats m = as_floats((as_words(x) & set_words(0x007fffff)) | set_words(0x3f800000));
    return choose(compare<_CMP_GE_OQ>(m, set(1.5f)), multiply(m, set(0.5f)), m);
}

// 16 words: the first of each two, or the second.
inline __m256i in_order(__m256 x) { return _mm256_permute4x64_epi64(_mm256_castps_si256(x), 0xd8); }
template <int which>
inline __m256i of_each_two(const Words& x) {
    return in_order(_mm256_shuffle_ps(_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high), which));
}
inline Words evens(const Words& a, const Words& b) { return {of_each_two<0x88>(a), of_each_two<0x88>(b)}; }
inline Words odds(const Words& a, const Words& b) { return {of_each_two<0xdd>(a), of_each_two<0xdd>(b)}; }
inline Words right_signed(const Words& a, int bits) {
    return {_mm256_srai_epi32(a.low, bits), _mm256_srai_epi32(a.high, bits)};
}
inline __m256i load_shorts(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Words widen_signed_shorts(__m256i x) {
    return {_mm256_cvtepi16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepi16_epi32(_mm256_extracti128_si256(x, 1))};
}

// Rounded to 16 bits, to the nearest one and of two to the even one, in the high half of each 32 bits.
inline __m256i round_number(__m256i bits) {  // that isn't NaN
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
inline __m256i to_bf16(const Floats& x) { return high_halves(round_any(x.low), round_any(x.high)); }

inline __m256 add_pairs(__m256 sum, __m256i a, __m256i b) {
    const __m256i second = _mm256_set1_epi32((int)0xffff0000);
    sum = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(a, second)),
                          _mm256_castsi256_ps(_mm256_and_si256(b, second)), sum);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)),
                           sum);
}
inline Floats add_pairs(const Floats& sum, const Words& a, const Words& b) {
    return {add_pairs(sum.low, a.low, b.low), add_pairs(sum.high, a.high, b.high)};
}

}  // namespace vectors
