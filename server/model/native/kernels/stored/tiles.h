// Weights as GGUF stores them, in 4 or 8 bits, packed for 32 outputs at a time, and the 16-bit weights that they are.
#pragma once

#include <cstdint>

#include "../numbers.h"

// GGUF's blocks, of kTile inputs of one output each, in little-endian order.
struct BlockQ4_1 {  // input i is scale · code + least; codes i and i + 16 share a byte, whose low half is i's
    uint16_t scale, least;
    uint8_t codes[kTile / 2];
};
struct BlockQ8_0 {  // input i is scale · codes[i]
    uint16_t scale;
    int8_t codes[kTile];
};

// The same blocks of a tile's 32 outputs: what expands to [16 pairs][32 outputs][2].
struct TileQ4_1 {
    uint16_t scales[kTile], least[kTile];
    uint32_t codes[2][2 * kTile];  // of eight pairs, four bits each: of an output's first input and its second
};
struct TileQ8_0 {
    uint16_t scales[kTile];
    int8_t codes[kTile / 2][2 * kTile];
};
static_assert(sizeof(BlockQ4_1) * kTile == sizeof(TileQ4_1) && sizeof(BlockQ8_0) * kTile == sizeof(TileQ8_0));

// fp16 numbers of 16 outputs, each twice as a tile's rows have them: eight outputs a register.
struct Twice {
    __m512 low, high;
    explicit Twice(const uint16_t* p) {
        const __m512i first = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        const __m512 x = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
        low = _mm512_permutexvar_ps(first, x);
        high = _mm512_permutexvar_ps(_mm512_add_epi32(first, _mm512_set1_epi32(8)), x);
    }
};

// Calls visit(pair, w) for each of a tile's 16 pairs of inputs in their order, w being the weights of 16 outputs, from
// the output `first` on. Products of a scale and a code are exact in fp32, so that a sum is rounded once, then to bf16.
template <class Visit>
inline void each_pair(const TileQ4_1& from, int first, Visit visit) {
    const Twice scales(from.scales + first), least(from.least + first);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        __m512i low = _mm512_loadu_si512(from.codes[half] + 2 * first);
        __m512i high = _mm512_loadu_si512(from.codes[half] + 2 * first + 16);
#pragma GCC unroll 8
        for (int pair = 0; pair < 8; pair++) {
            visit(8 * half + pair,
                  _mm512_cvtne2ps_pbh(_mm512_fmadd_ps(vectors::lowest_four_bits(high), scales.high, least.high),
                                      _mm512_fmadd_ps(vectors::lowest_four_bits(low), scales.low, least.low)));
            low = _mm512_srli_epi32(low, 4), high = _mm512_srli_epi32(high, 4);
        }
    }
}
template <class Visit>
inline void each_pair(const TileQ8_0& from, int first, Visit visit) {
    const Twice scales(from.scales + first);
#pragma GCC unroll 16
    for (int pair = 0; pair < kTile / 2; pair++) {
        auto load = [&](int output) {
            const __m128i codes = _mm_loadu_si128((const __m128i*)(from.codes[pair] + 2 * output));
            return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
        };
        visit(pair,
              _mm512_cvtne2ps_pbh(_mm512_mul_ps(load(first + 8), scales.high), _mm512_mul_ps(load(first), scales.low)));
    }
}

// The blocks of 32 outputs, `stride` apart.
inline void pack(const BlockQ4_1* from, size_t stride, TileQ4_1& to) {
    for (int row = 0; row < kTile; row++) {
        const BlockQ4_1& block = from[row * stride];
        to.scales[row] = block.scale, to.least[row] = block.least;
        for (int i = 0; i < 2; i++) {
            uint32_t low = 0, high = 0;
            for (int pair = 0; pair < 8; pair++) {
                low |= (uint32_t)(block.codes[2 * pair + i] & 15) << 4 * pair;
                high |= (uint32_t)(block.codes[2 * pair + i] >> 4) << 4 * pair;
            }
            to.codes[0][2 * row + i] = low, to.codes[1][2 * row + i] = high;
        }
    }
}
inline void pack(const BlockQ8_0* from, size_t stride, TileQ8_0& to) {
    for (int row = 0; row < kTile; row++) {
        const BlockQ8_0& block = from[row * stride];
        to.scales[row] = block.scale;
        for (int i = 0; i < kTile; i++) to.codes[i / 2][2 * row + i % 2] = block.codes[i];
    }
}
