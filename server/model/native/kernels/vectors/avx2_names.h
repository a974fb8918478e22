// AVX-512's names for what avx2.h has.
#pragma once
#include "avx2.h"

// clang-format off
#undef _mm512_setr_ps  // those that compilers have as macros
#undef _mm512_setr_epi32
#undef _mm512_setr_epi64
#undef _mm512_cmp_ps_mask
#undef _mm512_mask_cmp_ps_mask
#undef _mm512_shuffle_i32x4
#undef _mm512_roundscale_ps
#undef _mm512_getmant_ps
#undef _mm512_extractf32x8_ps
#define __m512 avx2::Floats
#define __m512d avx2::Doubles
#define __m512i avx2::Words
#define __m512bh avx2::Words
#define _mm512_loadu_ps avx2::load
#define _mm512_storeu_ps avx2::store
#define _mm512_loadu_si512 avx2::load_words
#define _mm512_load_si512 avx2::load_words
#define _mm512_storeu_si512 avx2::store
#define _mm512_set1_ps avx2::set
#define _mm512_set1_epi32 avx2::set_words
#define _mm512_set1_epi64(x) avx2::longs_of(x, x, x, x, x, x, x, x)
#define _mm512_setr_ps avx2::floats_of
#define _mm512_setr_epi32 avx2::words_of
#define _mm512_setr_epi64 avx2::longs_of
#define _mm512_setzero_ps() avx2::set(0)
#define _mm512_setzero_si512() avx2::set_words(0)
#define _mm512_setzero_pd() avx2::Doubles{_mm256_setzero_pd(), _mm256_setzero_pd()}
#define _mm512_add_ps avx2::add
#define _mm512_sub_ps avx2::subtract
#define _mm512_mul_ps avx2::multiply
#define _mm512_div_ps avx2::divide
#define _mm512_min_ps avx2::least
#define _mm512_max_ps avx2::most
#define _mm512_fmadd_ps avx2::multiply_add
#define _mm512_fnmadd_ps avx2::subtract_product
#define _mm512_add_pd avx2::add
#define _mm512_cvtps_pd avx2::widen
#define _mm512_reduce_add_pd avx2::sum
#define _mm512_reduce_add_ps avx2::sum
#define _mm512_reduce_max_ps avx2::greatest
#define _mm512_mask_reduce_min_epi32 avx2::least_of
#define _mm512_cmp_ps_mask(a, b, predicate) avx2::compare<predicate>(a, b)
#define _mm512_mask_cmp_ps_mask(mask, a, b, predicate) (__mmask16)((mask) & avx2::compare<predicate>(a, b))
#define _mm512_mask_mov_ps(otherwise, mask, a) avx2::choose(mask, a, otherwise)
#define _mm512_mask_mov_epi32(otherwise, mask, a) avx2::choose(mask, a, otherwise)
#define _mm512_maskz_mov_ps(mask, a) avx2::choose(mask, a, avx2::set(0))
#define _mm512_maskz_mul_ps(mask, a, b) avx2::choose(mask, avx2::multiply(a, b), avx2::set(0))
#define _mm512_mask_add_ps(otherwise, mask, a, b) avx2::choose(mask, avx2::add(a, b), otherwise)
#define _mm512_mask_sub_ps(otherwise, mask, a, b) avx2::choose(mask, avx2::subtract(a, b), otherwise)
#define _mm512_mask_loadu_ps(otherwise, mask, p) avx2::choose(mask, avx2::as_floats(avx2::load_some(mask, p)), otherwise)
#define _mm512_maskz_loadu_epi32 avx2::load_some
#define _mm512_mask_storeu_ps(p, mask, a) avx2::store_some(p, mask, avx2::as_words(a))
#define _mm512_mask_storeu_epi32 avx2::store_some
#define _mm256_mask_storeu_epi16 avx2::store_some
#define _mm512_castsi512_ps avx2::as_floats
#define _mm512_castps512_ps256(a) (a).low
#define _mm512_extractf32x8_ps(a, half) ((half) ? (a).high : (a).low)
#define _mm512_cvtepi32_ps avx2::to_floats
#define _mm512_cvtepu16_epi32 avx2::widen_unsigned
#define _mm512_cvtepi8_epi32 avx2::widen_signed
#define _mm512_cvtph_ps avx2::from_halfs
#define _mm512_add_epi32 avx2::add
#define _mm512_add_epi64 avx2::add_longs
#define _mm512_mullo_epi32 avx2::multiply
#define _mm512_and_si512 avx2::operator&
#define _mm512_or_si512 avx2::operator|
#define _mm512_xor_si512 avx2::operator^
#define _mm512_slli_epi32 avx2::left
#define _mm512_srli_epi32 avx2::right
#define _mm512_unpacklo_epi32 avx2::unpack_low_words
#define _mm512_unpackhi_epi32 avx2::unpack_high_words
#define _mm512_unpacklo_epi64 avx2::unpack_low_longs
#define _mm512_unpackhi_epi64 avx2::unpack_high_longs
#define _mm512_shuffle_i32x4(a, b, which) avx2::quarters<which>(a, b)
#define _mm512_roundscale_ps(x, to_whole) avx2::round(x)
#define _mm512_scalef_ps avx2::scale
#define _mm512_getexp_ps avx2::exponent
#define _mm512_getmant_ps(x, interval, sign) avx2::mantissa(x)
#define _mm512_cvtneps_pbh avx2::to_bf16
#define _mm512_dpbf16_ps avx2::add_pairs
// clang-format on
