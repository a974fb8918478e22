// Packs single tiles of row-major bf16 matrices for `multiply`, when they are needed.
//
// In training a packed tile is multiplied with many rows. Packing takes a few percent of that time, so no packed copy
// of the weights is kept.
#pragma once
#include "matrix.h"

constexpr int kNarrowBlock = simd::kSums;  // rows of a register block of half a tile's outputs
constexpr int kPrefetchRows = 24;          // rows that are multiplied between two batches of prefetches

using Panel = Aligned<uint32_t>;  // one packed tile, [pairs][32], in the layout of a Matrix

// Transposes a 16 × 16 matrix of 32-bit numbers in registers.
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
    for (int i = 0; i < 4; i++) {  // in r[i + 4 k], quarter j is column 4 j + i of rows 4 k to 4 k + 3
        U32x16 a = even_quarters(r[i], r[4 + i]), b = odd_quarters(r[i], r[4 + i]);
        U32x16 c = even_quarters(r[8 + i], r[12 + i]), d = odd_quarters(r[8 + i], r[12 + i]);
        t[i] = even_quarters(a, c);
        t[4 + i] = even_quarters(b, d);
        t[8 + i] = odd_quarters(a, c);
        t[12 + i] = odd_quarters(b, d);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

// Packs `outputs` (at most 32) rows of w, of `depth` numbers each, into a tile; depth is even. Missing rows are zero.
// With a `width` of 16, the second half of the tile is left unchanged.
inline void pack_rows(const bf16* w, size_t stride, int outputs, int depth, uint32_t* panel, int width = kTile) {
    for (int half = 0; half < width; half += 16, w += 16 * stride, panel += 16)
        for (int pair = 0; pair < depth / 2; pair += 16) {
            const int pairs = std::min(16, depth / 2 - pair), rows = outputs - half;
            const Mask16 lanes = first_lanes(pairs);
            U32x16 r[16];
            if (rows >= 16) {
                for (int i = 0; i < 16; i++) r[i] = load_lanes(lanes, w + i * stride + 2 * pair);
            } else {
                for (int i = 0; i < 16; i++) r[i] = load_lanes(i < rows ? lanes : Mask16{0}, w + i * stride + 2 * pair);
            }
            transpose16(r);
            for (int i = 0; i < pairs; i++) store(panel + (pair + i) * kTile, r[i]);
        }
}

// Packs 32 columns of w (depth, ·) into a tile. An odd depth is padded with zeros.
inline void pack_columns(const bf16* w, size_t stride, int depth, uint32_t* panel) {
    for (int row = 0; row < depth; row += 2, w += 2 * stride, panel += kTile) {
        __builtin_prefetch(w + 16 * stride, 0, 3);
        __builtin_prefetch(w + 17 * stride, 0, 3);
        const U32x16 a = load_u32(w);
        const U32x16 b = row + 1 < depth ? load_u32(w + stride) : U32x16{};
        store_interleaved(a, b, panel);
    }
}

// x_T (columns, ·) = the transpose of x (rows, columns); columns is a multiple of 16. An odd number of rows is padded
// with zeros.
inline void transpose(const bf16* x, size_t stride, int rows, int columns, bf16* x_T, size_t x_T_stride) {
    for (int row = 0; row < rows; row += 32)
        for (int column = 0; column < columns; column += 16) {
            const bf16* corner = x + row * stride + column;
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
                store_lanes(x_T + (column + i) * x_T_stride + row, first_lanes((left + 1) / 2), r[i]);
        }
}

// `multiply` of matrix.h with a packed tile.
template <bool add = false>
inline void multiply(const bf16* x, size_t x_stride, int rows, const uint32_t* panel, int pairs, float* y,
                     size_t y_stride) {
    multiply<add>(x, x_stride, rows, reinterpret_cast<const bf16*>(panel), pairs, y, y_stride);
}

// The same, while 32 columns of w (depth, ·), the next tile, are prefetched. Hardware prefetchers don't recognize lines
// so far apart.
inline void multiply_and_prefetch(const Rows& x, int rows, const uint32_t* panel, int pairs, float* y, size_t y_stride,
                                  const bf16* w, size_t stride, int depth) {
    for (int start = 0; start < rows; start += kPrefetchRows) {
        const int count = std::min(kPrefetchRows, rows - start);
        const int end = static_cast<int>(static_cast<int64_t>(depth) * (start + count) / rows);
        for (int row = static_cast<int>(static_cast<int64_t>(depth) * start / rows); row < end; row++)
            prefetch_line(w + row * stride);
        multiply(x.from(start), count, reinterpret_cast<const bf16*>(panel), pairs, y + start * y_stride, y_stride);
    }
}

// y (rows, 16) = x (rows, 2 · pairs) times the first half of a packed tile.
template <int rows>
inline void multiply_narrow_block(const bf16* x, size_t x_stride, const uint32_t* panel, int pairs, float* y,
                                  size_t y_stride) {
    F32x16 sum[rows];
#pragma GCC unroll 24
    for (int row = 0; row < rows; row++) sum[row] = F32x16{};
    for (int pair = 0; pair < pairs; pair++, panel += kTile) {
        const U32x16 w = load_pairs(reinterpret_cast<const bf16*>(panel));
#pragma GCC unroll 24
        for (int row = 0; row < rows; row++) {
            const U32x16 x_pair = broadcast_pair(x + row * x_stride + 2 * pair);
            sum[row] = fmadd_pairs(x_pair, w, sum[row]);
        }
    }
#pragma GCC unroll 24
    for (int row = 0; row < rows; row++) store(y + row * y_stride, sum[row]);
}

// y (rows, 16) = x (rows, 2 · pairs) times the first half of a packed tile, with the bits of `multiply` without AMX. A
// block has twice as many rows as one of a whole tile, and so as many sums.
inline void multiply_narrow(const bf16* x, size_t x_stride, int rows, const uint32_t* panel, int pairs, float* y,
                            size_t y_stride) {
    static constexpr auto kByRows = []<int... rows>(std::integer_sequence<int, rows...>) {
        return std::array{multiply_narrow_block<rows + 1>...};
    }(std::make_integer_sequence<int, kNarrowBlock>{});
    while (rows > 0) {
        const int blocks = (rows + kNarrowBlock - 1) / kNarrowBlock;
        const int block = (rows + blocks - 1) / blocks;
        kByRows[block - 1](x, x_stride, panel, pairs, y, y_stride);
        x += block * x_stride;
        y += block * y_stride;
        rows -= block;
    }
}
