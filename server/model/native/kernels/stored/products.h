// The products of tiles that are stored in 4 or 8 bits a weight: the very sums of the 16-bit weights that they are.
//
// A few rows are multiplied by a weight in the register in which it was expanded. For more, a whole tile is expanded
// first, and multiplied as any other.
#pragma once
#include <array>
#include <cstring>
#include <utility>

#include "../prefetch.h"
#include "tiles.h"

using simd::kStoredRows;
constexpr bool kBothHalves = simd::kSums >= 24;  // of a tile at once: a sum waits for the one before

template <class Tile>
inline void prefetch_ahead(const Tile* tile) {
    for (size_t line = 0; line < sizeof(Tile); line += 64) prefetch_line((const char*)tile + kBytesAhead + line);
}

// `to`: [16 pairs][32 outputs][2].
template <class Tile>
inline void expand(const Tile& from, bf16* to) {
    for (int first = 0; first < kTile; first += 16)
        each_pair<1>(from, first,
                     [&](int pair, const simd::Pairs& w) { store(to + (pair * kTile + first) * 2, simd::packed(w)); });
}

// All of `rows` rows, each named by itself: of an index that is counted, the compiler keeps the sums in memory.
template <class Tile, class Prefetched, int rows>
inline void multiply_stored_block(const bf16* x, size_t x_stride, const Tile* tiles, int count, float* y,
                                  size_t y_stride, Prefetched lines, size_t lines_each) {
    [&]<int... row>(std::integer_sequence<int, row...>) {
        F32x16 left[rows], right[rows];
        ((left[row] = right[row] = F32x16{}), ...);
        for (int i = 0; i < count; i++) {
            prefetch_ahead(tiles + i);
            lines.prefetch(lines_each);
            auto both = [&](int of, int pair) {
                uint32_t two;
                memcpy(&two, x + of * x_stride + i * kTile + 2 * pair, 4);
                return broadcast_u32(two);
            };
            if constexpr (kBothHalves) {
                each_pair<2>(tiles[i], 0, [&](int pair, const simd::Pairs& first, const simd::Pairs& second) {
                    ((left[row] = simd::add_products(left[row], both(row, pair), first),
                      right[row] = simd::add_products(right[row], both(row, pair), second)),
                     ...);
                });
            } else {
                each_pair<1>(tiles[i], 0, [&](int pair, const simd::Pairs& w) {
                    ((left[row] = simd::add_products(left[row], both(row, pair), w)), ...);
                });
                asm volatile("" ::: "memory");  // x is read again: its copies would take all registers
                each_pair<1>(tiles[i], 16, [&](int pair, const simd::Pairs& w) {
                    ((right[row] = simd::add_products(right[row], both(row, pair), w)), ...);
                });
            }
        }
        (store(y + row * y_stride, left[row]), ...);
        (store(y + row * y_stride + 16, right[row]), ...);
    }(std::make_integer_sequence<int, rows>{});
}

// y (rows, 32) = x (rows, 32 · count) times the tiles of 32 outputs; at most kStoredRows rows.
template <class Tile, class Prefetched>
inline void multiply_stored(const bf16* x, size_t x_stride, int rows, const Tile* tiles, int count, float* y,
                            size_t y_stride, Prefetched lines, size_t lines_each) {
    static constexpr auto kByRows = []<int... rows>(std::integer_sequence<int, rows...>) {
        return std::array{multiply_stored_block<Tile, Prefetched, rows + 1>...};
    }(std::make_integer_sequence<int, kStoredRows>{});
    kByRows[rows - 1](x, x_stride, tiles, count, y, y_stride, lines, lines_each);
}
template <class Tile>
inline void multiply_stored(const bf16* x, size_t x_stride, int rows, const Tile* tiles, int count, float* y,
                            size_t y_stride, PrefetchList& prefetch) {
    if (prefetch.size() == 0) return multiply_stored(x, x_stride, rows, tiles, count, y, y_stride, NoLines(), 0);
    const size_t each = (prefetch.size() + count - 1) / count;
    multiply_stored(x, x_stride, rows, tiles, count, y, y_stride, prefetch.lines<1>(), each);
}
