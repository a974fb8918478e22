// Vectors of 16 numbers, for kernels. The instruction set is chosen at compile time; each has its own classes.
//
// F32x16, F64x8 and U32x16 have the usual operators, lane by lane; U16x16 holds 16-bit numbers. Bit i of a Mask16
// belongs to lane i. Memory needs no alignment. Each instruction set's header defines, in namespace simd:
//
//   load, load_u32, load_u16, store           whole vectors
//   load_lanes, store_lanes                   the lanes of a mask; other lanes are 0, other memory isn't accessed
//   store_interleaved                         two rows of 32 16-bit numbers, alternating
//   store_lines                               the addresses of eight consecutive cache lines of 64 bytes
//   broadcast, broadcast_u32, lane_numbers    one number in all lanes; 0 to 15
//   fmadd, fnmadd                             a b + c and c - a b, rounded once
//   fmadd_pairs                               c + both products of the pairs of bf16 in a and b, the second's first
//   min, max, choose                          choose(mask, a, b): a where the mask is set, else b
//   is_less, is_greater, is_at_least, ...     masks; is_less: also of U32x16, as signed numbers
//   nonzero_bytes                             the mask of 16 bytes in memory
//   reduce_add, reduce_max, reduce_min        over all lanes, or those of a mask
//   as_f32, as_u32; to_f32, to_bf16, widen    the same bits; converted numbers
//   widen_low, widen_high                     eight of the lanes as F64x8
//   unpack_..., even_quarters, odd_quarters   AVX-512's permutations, for transposes
//   round_to_whole, scale_by_power            scale_by_power(x, n) = x 2^n
//   exponent, mantissa                        of positive normal x = 2^exponent mantissa, 0.75 <= mantissa < 1.5
//   low_code, high_code                       the lowest four bits of each 32-bit lane, or of its upper half, as floats
//
// It also defines is_supported(); float_mode() and set_float_mode() with kFlushesToZero; pause(), for loops that wait;
// and three constants:
//
//   kSums         the number of sums of 16 numbers that fit into registers together with their operands
//   kWideSums     the same if one operand is fp32 in memory, or 0 if that gains nothing
//   kStoredRows   the greatest number of rows for which stored weights are expanded in registers, not to a copy
//
// pairs.h and split_pairs.h expand stored weights, and multiply by them.
#pragma once

#if defined(__aarch64__)
#include "neon.h"
#elif defined(__AVX512F__)
#include "avx512.h"
#else
#include "avx2.h"
#endif

namespace simd {

// The pairs of inputs of 16 outputs, divided between two vectors as pairs.h or split_pairs.h says.
struct SplitFloats {
    F32x16 first, second;
};
struct SplitWords {
    U32x16 first, second;
};

}  // namespace simd

#ifdef __AVX512F__
#include "pairs.h"
#else
#include "split_pairs.h"
#endif

using namespace simd;
