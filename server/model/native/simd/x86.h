// Functions that AVX2 and AVX-512 share.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace simd {

using Mask16 = uint16_t;

constexpr unsigned kFlushesToZero = 0x8040;  // denormal operands and results become 0

inline unsigned float_mode() { return _mm_getcsr(); }
inline void set_float_mode(unsigned mode) { _mm_setcsr(mode); }
inline void pause() { _mm_pause(); }

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

inline Mask16 nonzero_bytes(const void* p) {
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(p));
    return static_cast<Mask16>(~_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128())));
}

}  // namespace simd
