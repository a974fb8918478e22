// The instructions that kernels are written in: AVX-512's with bf16 products, or the same made of what there is.
//
// Beside them each processor's header has in namespace `vectors`: is_supported(), kFlushesToZero of what _mm_setcsr
// takes, are_not_zero(16 bytes), store_interleaved(two rows of 32 numbers of 16 bits, where to), and
// low_code(16 words) and high_code, the lowest four bits of either half of each as floats; kSums, how many sums of 16
// numbers registers hold beside what they are of; kWideSums, how many where that is in 32 bits, or 0 where that brings
// nothing; and kStoredRows, how many rows are multiplied by stored weights faster where those are expanded in registers
// than by an expanded copy. side_by_side.h and apart.h have what expands stored weights, and multiplies by them.
#pragma once

#if defined(__aarch64__)
#include "arm.h"
#include "names.h"
#elif defined(__AVX512F__)
#include "avx512.h"
#else
#include "avx2.h"
#include "names.h"
#endif

namespace vectors {

// Numbers of a pair of inputs of 16 outputs.
struct SplitFloats {
    __m512 one, other;
};
struct SplitWords {
    __m512i one, other;
};

}  // namespace vectors

#ifdef __AVX512F__
#include "side_by_side.h"
#else
#include "apart.h"
#endif
