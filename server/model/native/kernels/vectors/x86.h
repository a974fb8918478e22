// What AVX2 and AVX-512 have alike of vectors.h.
#pragma once
#include <immintrin.h>

namespace vectors {

constexpr unsigned kFlushesToZero = 0x8040;  // of what is read and of what is computed

inline bool is_supported() {
    bool found = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef __AVX512F__
    found = found && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
#ifdef __AVX512BF16__
    found = found && __builtin_cpu_supports("avx512bf16");
#endif
    return found;
}

inline __mmask16 are_not_zero(__m128i bytes) {
    return (__mmask16)~_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()));
}

}  // namespace vectors
