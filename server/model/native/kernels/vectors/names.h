// AVX-512's names for what avx2.h or neon.h makes of the registers that there are.
#pragma once

// clang-format off
#undef _mm512_setr_epi32  // those that compilers have as macros
#undef _mm512_setr_epi64
#undef _mm512_cmp_ps_mask
#undef _mm512_mask_cmp_ps_mask
#undef _mm512_shuffle_i32x4
#undef _mm512_roundscale_ps
#undef _mm512_getmant_ps
#undef _mm512_extractf32x8_ps
#define __m512 vectors::Floats
#define __m512d vectors::Doubles
#define __m512i vectors::Words
#define __m512bh vectors::Words
#define _mm512_loadu_ps vectors::load
#define _mm512_storeu_ps vectors::store
#define _mm512_loadu_si512 vectors::load_words
#define _mm512_load_si512 vectors::load_words
#define _mm512_storeu_si512 vectors::store
#define _mm512_set1_ps vectors::set
#define _mm512_set1_epi32 vectors::set_words
#define _mm512_set1_epi64(x) vectors::longs_of(x, x, x, x, x, x, x, x)
#define _mm512_setr_epi32 vectors::words_of
#define _mm512_setr_epi64 vectors::longs_of
#define _mm512_setzero_ps() vectors::set(0)
#define _mm512_setzero_si512() vectors::set_words(0)
#define _mm512_setzero_pd() vectors::Doubles{}
#define _mm512_add_ps vectors::add
#define _mm512_sub_ps vectors::subtract
#define _mm512_mul_ps vectors::multiply
#define _mm512_div_ps vectors::divide
#define _mm512_min_ps vectors::least
#define _mm512_max_ps vectors::most
#define _mm512_fmadd_ps vectors::multiply_add
#define _mm512_fnmadd_ps vectors::subtract_product
#define _mm512_add_pd vectors::add
#define _mm512_cvtps_pd vectors::widen
#define _mm512_reduce_add_pd vectors::sum
#define _mm512_reduce_add_ps vectors::sum
#define _mm512_reduce_max_ps vectors::greatest
#define _mm512_mask_reduce_min_epi32 vectors::least_of
#define _mm512_cmp_ps_mask(a, b, predicate) vectors::compare<predicate>(a, b)
#define _mm512_mask_cmp_ps_mask(mask, a, b, predicate) (__mmask16)((mask) & vectors::compare<predicate>(a, b))
#define _mm512_mask_mov_ps(otherwise, mask, a) vectors::choose(mask, a, otherwise)
#define _mm512_mask_mov_epi32(otherwise, mask, a) vectors::choose(mask, a, otherwise)
#define _mm512_maskz_mov_ps(mask, a) vectors::choose(mask, a, vectors::set(0))
#define _mm512_maskz_mul_ps(mask, a, b) vectors::choose(mask, vectors::multiply(a, b), vectors::set(0))
#define _mm512_mask_add_ps(otherwise, mask, a, b) vectors::choose(mask, vectors::add(a, b), otherwise)
#define _mm512_mask_sub_ps(otherwise, mask, a, b) vectors::choose(mask, vectors::subtract(a, b), otherwise)
#define _mm512_mask_loadu_ps(otherwise, mask, p) vectors::choose(mask, vectors::as_floats(vectors::load_some(mask, p)), otherwise)
#define _mm512_maskz_loadu_epi32 vectors::load_some
#define _mm512_mask_storeu_ps(p, mask, a) vectors::store_some(p, mask, vectors::as_words(a))
#define _mm512_mask_storeu_epi32 vectors::store_some
#define _mm256_mask_storeu_epi16 vectors::store_some
#define _mm512_castsi512_ps vectors::as_floats
#define _mm512_castps512_ps256 vectors::low_half
#define _mm512_extractf32x8_ps(a, half) ((half) ? vectors::high_half(a) : vectors::low_half(a))
#define _mm512_cvtepi32_ps vectors::to_floats
#define _mm512_cvtepu16_epi32 vectors::widen_unsigned
#define _mm512_cvtph_ps vectors::from_halfs
#define _mm512_add_epi32 vectors::add
#define _mm512_add_epi64 vectors::add_longs
#define _mm512_mullo_epi32 vectors::multiply
#define _mm512_and_si512 vectors::operator&
#define _mm512_or_si512 vectors::operator|
#define _mm512_xor_si512 vectors::operator^
#define _mm512_slli_epi32 vectors::left
#define _mm512_srli_epi32 vectors::right
#define _mm512_unpacklo_epi32 vectors::unpack_low_words
#define _mm512_unpackhi_epi32 vectors::unpack_high_words
#define _mm512_unpacklo_epi64 vectors::unpack_low_longs
#define _mm512_unpackhi_epi64 vectors::unpack_high_longs
#define _mm512_shuffle_i32x4(a, b, which) vectors::quarters<which>(a, b)
#define _mm512_roundscale_ps(x, to_whole) vectors::round(x)
#define _mm512_scalef_ps vectors::scale
#define _mm512_getexp_ps vectors::exponent
#define _mm512_getmant_ps(x, interval, sign) vectors::mantissa(x)
#define _mm512_cvtneps_pbh vectors::to_bf16
#define _mm512_dpbf16_ps vectors::add_pairs
// clang-format on
