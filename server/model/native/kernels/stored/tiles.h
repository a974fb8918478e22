// Weights as GGUF stores them, in 4 or 8 bits, packed for 32 outputs at a time, and the 16-bit weights that they are.
#pragma once

#include <cstdint>
#include <utility>

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
    uint32_t codes[2][2 * kTile];  // of eight pairs each, `code_at`: of an output's first input and its second
};
struct TileQ8_0 {
    uint16_t scales[kTile];
    int8_t codes[kTile / 2][2 * kTile];
};
static_assert(sizeof(BlockQ4_1) * kTile == sizeof(TileQ4_1) && sizeof(BlockQ8_0) * kTile == sizeof(TileQ8_0));

// Of the eight pairs that share a word: the first bit of a pair's four. Two lie half a word apart.
constexpr int code_at(int pair) { return 16 * (pair % 2) + 4 * (pair / 2); }

// Calls visit(pair, w...) for each of a tile's 16 pairs of inputs in their order, each w being the weights of 16
// outputs as simd::Pairs: of `count` times 16, from the output `first` on. Products of a scale and a code are exact
// in fp32, so that a sum is rounded once, then to bf16.
template <int count, class Visit>
inline void each_pair(const TileQ4_1& from, int first, Visit visit) {
    [&]<int... i>(std::integer_sequence<int, i...>) {
        const simd::Scales scales[] = {simd::load_scales(from.scales + first + 16 * i)...};
        const simd::Scales least[] = {simd::load_scales(from.least + first + 16 * i)...};
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            simd::SplitWords codes[] = {simd::split_words(from.codes[half] + 2 * (first + 16 * i))...};
#pragma GCC unroll 4
            for (int pair = 8 * half; pair < 8 * half + 8; pair += 2) {
                visit(pair, simd::scaled({simd::low_code(codes[i].one), simd::low_code(codes[i].other)}, scales[i],
                                         least[i])...);
                visit(pair + 1, simd::scaled({simd::high_code(codes[i].one), simd::high_code(codes[i].other)},
                                             scales[i], least[i])...);
                ((codes[i] = {codes[i].one >> 4, codes[i].other >> 4}), ...);
            }
        }
    }(std::make_integer_sequence<int, count>{});
}
template <int count, class Visit>
inline void each_pair(const TileQ8_0& from, int first, Visit visit) {
    [&]<int... i>(std::integer_sequence<int, i...>) {
        const simd::Scales scales[] = {simd::load_scales(from.scales + first + 16 * i)...};
#pragma GCC unroll 16
        for (int pair = 0; pair < kTile / 2; pair++)
            visit(pair, simd::scaled(simd::split_bytes(from.codes[pair] + 2 * (first + 16 * i)), scales[i])...);
    }(std::make_integer_sequence<int, count>{});
}

// The blocks of 32 outputs, `stride` apart.
inline void pack(const BlockQ4_1* from, size_t stride, TileQ4_1& to) {
    for (int row = 0; row < kTile; row++) {
        const BlockQ4_1& block = from[row * stride];
        to.scales[row] = block.scale, to.least[row] = block.least;
        for (int i = 0; i < 2; i++) {
            uint32_t low = 0, high = 0;
            for (int pair = 0; pair < 8; pair++) {
                low |= (uint32_t)(block.codes[2 * pair + i] & 15) << code_at(pair);
                high |= (uint32_t)(block.codes[2 * pair + i] >> 4) << code_at(pair);
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
