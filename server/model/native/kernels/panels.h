// Packs tiles of row-major bf16 matrices for `multiply`, each when it is needed.
//
// A packed tile is multiplied with many rows. Packing costs a few hundredths of that, so no second, packed copy of the
// weights has to be kept.
#pragma once
#include "matrix.h"

constexpr int kNarrowBlock = simd::kSums;  // rows of a register block of half a tile
constexpr int kPrefetchRows = 24;          // that are multiplied between two shares of the next tile

using Panel = Aligned<uint32_t>;  // [pairs][32], as one tile of a Matrix

// Transposes 16 registers of 16 numbers of 32 bits.
inline void transpose16(U32x16* r) {
    U32x16 t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = unpack_low_u32(r[i], r[i + 1]);
        t[i + 1] = unpack_high_u32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = unpack_low_u64(t[i], t[i + 2]);
        r[i + 1] = unpack_high_u64(t[i], t[i + 2]);
        r[i + 2] = unpack_low_u64(t[i + 1], t[i + 3]);
        r[i + 3] = unpack_high_u64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {  // in r[i] and each fourth after it, quarter j is column 4 j + i of four rows
        U32x16 a = even_quarters(r[i], r[4 + i]), b = odd_quarters(r[i], r[4 + i]);
        U32x16 c = even_quarters(r[8 + i], r[12 + i]), d = odd_quarters(r[8 + i], r[12 + i]);
        t[i] = even_quarters(a, c), t[4 + i] = even_quarters(b, d);
        t[8 + i] = odd_quarters(a, c), t[12 + i] = odd_quarters(b, d);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

// Packs a tile from `outputs` (at most 32) rows of w, each of `depth` numbers, which is even. Missing rows are zero;
// with a `width` of 16 the tile's other half is left as it is.
inline void pack_rows(const bf16* w, size_t stride, int outputs, int depth, uint32_t* to, int width = kTile) {
    for (int half = 0; half < width; half += 16, w += 16 * stride, to += 16)
        for (int pair = 0; pair < depth / 2; pair += 16) {
            const int now = std::min(16, depth / 2 - pair), rows = outputs - half;
            const Mask16 lanes = first_lanes(now);
            U32x16 r[16];
            if (rows >= 16) {
                for (int i = 0; i < 16; i++) r[i] = load_lanes(lanes, w + i * stride + 2 * pair);
            } else {
                for (int i = 0; i < 16; i++) r[i] = load_lanes(i < rows ? lanes : Mask16{0}, w + i * stride + 2 * pair);
            }
            transpose16(r);
            for (int i = 0; i < now; i++) store(to + (pair + i) * kTile, r[i]);
        }
}

// Packs a tile from 32 columns of w, which has `depth` rows. An odd depth is padded with zeros.
inline void pack_columns(const bf16* w, size_t stride, int depth, uint32_t* to) {
    for (int row = 0; row < depth; row += 2, w += 2 * stride, to += kTile) {
        __builtin_prefetch(w + 16 * stride, 0, 3);
        __builtin_prefetch(w + 17 * stride, 0, 3);
        U32x16 a = load_u32(w);
        U32x16 b = row + 1 < depth ? load_u32(w + stride) : U32x16{};
        store_interleaved(a, b, to);
    }
}

// to (columns, ·) = the transpose of from (rows, columns); columns is a multiple of 16. An odd number of rows is padded
// with zeros.
inline void transpose(const bf16* from, size_t stride, int rows, int columns, bf16* to, size_t to_stride) {
    for (int row = 0; row < rows; row += 32)
        for (int column = 0; column < columns; column += 16) {
            const bf16* corner = from + row * stride + column;
            const int left = rows - row;
            U32x16 r[16];
            for (int i = 0; i < 16; i++) {
                auto load = [&](int k) {
                    if (k >= left) return U32x16{};
                    return widen(load_u16(corner + k * stride));
                };
                r[i] = load(2 * i) | (load(2 * i + 1) << 16);
            }
            transpose16(r);
            for (int i = 0; i < 16; i++)
                store_lanes(to + (column + i) * to_stride + row, first_lanes((left + 1) / 2), r[i]);
        }
}

// y (rows, 32) of a packed tile; `multiply` of matrix.h.
template <bool add = false>
inline void multiply(const bf16* x, size_t x_stride, int rows, const uint32_t* panel, int pairs, float* y,
                     size_t y_stride) {
    multiply<add>(x, x_stride, rows, (const bf16*)panel, pairs, y, y_stride);
}

// The same, while 32 columns of w, which has `depth` rows, are prefetched to where `pack_columns` reads them fast: no
// processor foresees lines that lie so far apart.
inline void multiply_and_prefetch(const Rows& x, int rows, const uint32_t* panel, int pairs, float* y, size_t y_stride,
                                  const bf16* w, size_t stride, int depth) {
    for (int start = 0; start < rows; start += kPrefetchRows) {
        const int now = std::min(kPrefetchRows, rows - start);
        const int end = (int)((int64_t)depth * (start + now) / rows);
        for (int row = (int)((int64_t)depth * start / rows); row < end; row++) prefetch_line(w + row * stride);
        multiply(x.from(start), now, (const bf16*)panel, pairs, y + start * y_stride, y_stride);
    }
}

template <int rows>
inline void multiply_narrow_block(const bf16* x, size_t x_stride, const uint32_t* panel, int pairs, float* y,
                                  size_t y_stride) {
    F32x16 sum[rows];
#pragma GCC unroll 24
    for (int row = 0; row < rows; row++) sum[row] = F32x16{};
    for (int pair = 0; pair < pairs; pair++, panel += kTile) {
        const U32x16 w = load_pairs((const bf16*)panel);
#pragma GCC unroll 24
        for (int row = 0; row < rows; row++) {
            uint32_t two;
            memcpy(&two, x + row * x_stride + 2 * pair, 4);
            sum[row] = fmadd_pairs(broadcast_u32(two), w, sum[row]);
        }
    }
#pragma GCC unroll 24
    for (int row = 0; row < rows; row++) store(y + row * y_stride, sum[row]);
}

// y (rows, 16) of the first half of a packed tile, the very sums of `multiply` without AMX: twice the rows at once keep
// as many registers busy as a whole tile does.
inline void multiply_narrow(const bf16* x, size_t x_stride, int rows, const uint32_t* panel, int pairs, float* y,
                            size_t y_stride) {
    static constexpr auto kByRows = []<int... rows>(std::integer_sequence<int, rows...>) {
        return std::array{multiply_narrow_block<rows + 1>...};
    }(std::make_integer_sequence<int, kNarrowBlock>{});
    while (rows > 0) {
        const int blocks = (rows + kNarrowBlock - 1) / kNarrowBlock, now = (rows + blocks - 1) / blocks;
        kByRows[now - 1](x, x_stride, panel, pairs, y, y_stride);
        x += now * x_stride, y += now * y_stride, rows -= now;
    }
}
