// What kernels use of x86 beside vectors, under the same names, on 64-bit Arm.
#pragma once
#include "neon_numbers.h"

namespace vectors {

constexpr bool is_supported() { return true; }  // by all 64-bit processors that Linux runs on

constexpr uint64_t kFlushesToZero = 1 << 24;  // of what is read and of what is computed

inline uint64_t rounding() {
    uint64_t now;
    asm volatile("mrs %0, fpcr" : "=r"(now));
    return now;
}
inline void set_rounding(uint64_t now) { asm volatile("msr fpcr, %0" ::"r"(now)); }

// About as long as x86's pause: `yield` takes no time on most processors.
inline void pause() { asm volatile("isb" ::: "memory"); }

// There is no AMX: what has_amx() keeps from running is compiled all the same.
template <class... Operands>
inline void no_tiles(const Operands&...) {
    __builtin_trap();
}

}  // namespace vectors

// The names of x86 that kernels use beside AVX-512's.
#define __m128i uint8x16_t
#define __m256i vectors::Shorts
#define __mmask16 uint16_t
#define _mm_loadu_si128 vectors::load_one<uint8x16_t>
#define _mm256_loadu_si256 vectors::load_shorts
#define _mm256_storeu_si256 vectors::store
#define _mm_prefetch(p, locality) __builtin_prefetch(p, 0, locality)
#define _MM_HINT_T0 3
#define _MM_HINT_T1 2
#define _mm_pause vectors::pause
#define _mm_getcsr vectors::rounding
#define _mm_setcsr vectors::set_rounding
#define _tile_loadconfig vectors::no_tiles
#define _tile_release vectors::no_tiles
#define _tile_zero vectors::no_tiles
#define _tile_loadd vectors::no_tiles
#define _tile_stored vectors::no_tiles
#define _tile_dpbf16ps vectors::no_tiles
