// GGUF's blocks of 4-bit and 8-bit weights, packed in tiles of 32 outputs, and their expansion to bf16.
#pragma once

#include <cstdint>
#include <utility>

#include "../numbers.h"

// GGUF's blocks: kTile inputs of one output, little-endian.
struct BlockQ4_1 {  // input i is scale · code + least; a byte has code i in its low half and code i + 16 in its high
                    // one
    uint16_t scale, least;
    uint8_t codes[kTile / 2];
};
struct BlockQ8_0 {  // input i is scale · codes[i]
    uint16_t scale;
    int8_t codes[kTile];
};

// The blocks of a tile's 32 outputs. They expand to [16 pairs][32 outputs][2].
struct TileQ4_1 {
    uint16_t scales[kTile], least[kTile];
    // A word has eight pairs' codes (`code_shift`): [half of the pairs][2 · output + input of the pair].
    uint32_t codes[2][2 * kTile];
};
struct TileQ8_0 {
    uint16_t scales[kTile];
    int8_t codes[kTile / 2][2 * kTile];
};
static_assert(sizeof(BlockQ4_1) * kTile == sizeof(TileQ4_1) && sizeof(BlockQ8_0) * kTile == sizeof(TileQ8_0));

// The first bit of a pair's code in a word. Neighbouring pairs are half a word apart.
constexpr int code_shift(int pair) { return 16 * (pair % 2) + 4 * (pair / 2); }

// Calls visit(pair, w...) for each of a tile's 16 pairs of inputs, in order. There are `count` arguments w, each the
// weights of 16 outputs as simd::Pairs, from the output `first` on. The product of a scale and a code is exact in fp32,
// so a weight is rounded once in fp32, and then to bf16.
template <int count, class Visit>
inline void each_pair(const TileQ4_1& tile, int first, Visit visit) {
    [&]<int... i>(std::integer_sequence<int, i...>) {
        const simd::Scales scales[] = {simd::load_scales(tile.scales + first + 16 * i)...};
        const simd::Scales least[] = {simd::load_scales(tile.least + first + 16 * i)...};
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            simd::SplitWords codes[] = {simd::split_words(tile.codes[half] + 2 * (first + 16 * i))...};
#pragma GCC unroll 4
            for (int pair = 8 * half; pair < 8 * half + 8; pair += 2) {
                visit(pair, simd::scaled({simd::low_code(codes[i].first), simd::low_code(codes[i].second)}, scales[i],
                                         least[i])...);
                visit(pair + 1, simd::scaled({simd::high_code(codes[i].first), simd::high_code(codes[i].second)},
                                             scales[i], least[i])...);
                ((codes[i] = {codes[i].first >> 4, codes[i].second >> 4}), ...);
            }
        }
    }(std::make_integer_sequence<int, count>{});
}
template <int count, class Visit>
inline void each_pair(const TileQ8_0& tile, int first, Visit visit) {
    [&]<int... i>(std::integer_sequence<int, i...>) {
        const simd::Scales scales[] = {simd::load_scales(tile.scales + first + 16 * i)...};
#pragma GCC unroll 16
        for (int pair = 0; pair < kTile / 2; pair++)
            visit(pair, simd::scaled(simd::split_bytes(tile.codes[pair] + 2 * (first + 16 * i)), scales[i])...);
    }(std::make_integer_sequence<int, count>{});
}

// Packs the blocks of 32 outputs, which are `stride` blocks apart.
inline void pack(const BlockQ4_1* blocks, size_t stride, TileQ4_1& tile) {
    for (int row = 0; row < kTile; row++) {
        const BlockQ4_1& block = blocks[row * stride];
        tile.scales[row] = block.scale;
        tile.least[row] = block.least;
        for (int i = 0; i < 2; i++) {
            uint32_t low = 0, high = 0;
            for (int pair = 0; pair < 8; pair++) {
                low |= static_cast<uint32_t>(block.codes[2 * pair + i] & 15) << code_shift(pair);
                high |= static_cast<uint32_t>(block.codes[2 * pair + i] >> 4) << code_shift(pair);
            }
            tile.codes[0][2 * row + i] = low;
            tile.codes[1][2 * row + i] = high;
        }
    }
}
inline void pack(const BlockQ8_0* blocks, size_t stride, TileQ8_0& tile) {
    for (int row = 0; row < kTile; row++) {
        const BlockQ8_0& block = blocks[row * stride];
        tile.scales[row] = block.scale;
        for (int i = 0; i < kTile; i++) tile.codes[i / 2][2 * row + i % 2] = block.codes[i];
    }
}
