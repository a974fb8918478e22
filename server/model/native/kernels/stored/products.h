// Products with tiles that are stored in 4 or 8 bits per weight. The sums have the same bits as with bf16 weights.
//
// Up to kStoredRows rows are multiplied with each weight while it is expanded in a register. For more rows, a whole
// tile is expanded first, and multiplied like a bf16 tile.
#pragma once
#include <array>
#include <cstring>
#include <utility>

#include "../prefetch.h"
#include "tiles.h"

using simd::kStoredRows;
constexpr bool kBothHalves = simd::kSums >= 24;  // of a tile at once: more independent sums hide their latency

template <class Tile>
inline void prefetch_ahead(const Tile* tile) {
    for (size_t line = 0; line < sizeof(Tile); line += 64)
        prefetch_line(reinterpret_cast<const char*>(tile) + kBytesAhead + line);
}

// Expands a stored tile of 32 inputs to values[16 pairs][32 outputs][2].
template <class Tile>
inline void expand(const Tile& tile, bf16* values) {
    for (int first = 0; first < kTile; first += 16)
        each_pair<1>(tile, first, [&](int pair, const simd::Pairs& w) {
            store(values + (pair * kTile + first) * 2, simd::packed(w));
        });
}

// y (rows, 32) = x (rows, 32 · count) times `count` tiles. Rows are unrolled by a parameter pack: with a loop, the
// compiler keeps the sums in memory.
template <class Tile, class Prefetched, int rows>
inline void multiply_stored_block(const bf16* x, size_t x_stride, const Tile* tiles, int count, float* y,
                                  size_t y_stride, Prefetched lines, size_t lines_each) {
    [&]<int... row>(std::integer_sequence<int, row...>) {
        F32x16 left[rows], right[rows];
        ((left[row] = right[row] = F32x16{}), ...);
        for (int i = 0; i < count; i++) {
            prefetch_ahead(tiles + i);
            lines.prefetch(lines_each);
            auto x_pair = [&](int x_row, int pair) {
                return broadcast_pair(x + x_row * x_stride + i * kTile + 2 * pair);
            };
            if constexpr (kBothHalves) {
                each_pair<2>(tiles[i], 0, [&](int pair, const simd::Pairs& first, const simd::Pairs& second) {
                    ((left[row] = simd::add_products(left[row], x_pair(row, pair), first),
                      right[row] = simd::add_products(right[row], x_pair(row, pair), second)),
                     ...);
                });
            } else {
                each_pair<1>(tiles[i], 0, [&](int pair, const simd::Pairs& w) {
                    ((left[row] = simd::add_products(left[row], x_pair(row, pair), w)), ...);
                });
                asm volatile("" ::: "memory");  // x is read again, since its copies would take all registers
                each_pair<1>(tiles[i], 16, [&](int pair, const simd::Pairs& w) {
                    ((right[row] = simd::add_products(right[row], x_pair(row, pair), w)), ...);
                });
            }
        }
        (store(y + row * y_stride, left[row]), ...);
        (store(y + row * y_stride + 16, right[row]), ...);
    }(std::make_integer_sequence<int, rows>{});
}

// y (rows, 32) = x (rows, 32 · count) times `count` tiles, for at most kStoredRows rows. Prefetches `lines_each` lines
// per tile.
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
    const size_t lines_each = (prefetch.size() + count - 1) / count;
    multiply_stored(x, x_stride, rows, tiles, count, y, y_stride, prefetch.lines<1>(), lines_each);
}
