// Products of rows that were widened to fp32, for AVX2, which has no product of bf16 pairs.
//
// `multiply_block` widens each number of x again for each tile. That takes registers, and half as many instructions as
// the multiplications. If many tiles are multiplied with the same rows, the rows are widened once: then six rows of
// sums fit into AVX2's registers instead of four. Each sum has the same bits as that of `fmadd_pairs`.
#pragma once
#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "../numbers.h"

constexpr int kWideBlock = simd::kWideSums;   // rows of a register block, which has half a tile's outputs
constexpr int kMinWideRows = kWideBlock - 1;  // fewer rows gain nothing
constexpr int kMinWideTiles = 4;              // fewer tiles aren't worth the widening
constexpr size_t kMaxWide = size_t{4} << 20;  // widened numbers per thread

struct Rows {  // rows of bf16 numbers
    const bf16* x;
    size_t stride;                // from one row to the next, in numbers
    const float* wide = nullptr;  // the same numbers in fp32, with the same stride; null if they weren't widened
    Rows from(int row) const { return {x + row * stride, stride, wide == nullptr ? nullptr : wide + row * stride}; }
};

// One thread's cache of widened rows of a phase's x.
class WideRows {
  public:
    // Begins a phase in which this thread multiplies about `tiles` tiles.
    void begin(int64_t tiles) {
        is_worth_it_ = tiles >= kMinWideTiles;
        has_.clear();
    }

    // Rows [start, start + rows) of x (·, depth). A phase always asks for the same pieces of the same x.
    Rows rows(const bf16* x, size_t depth, int start, int rows) {
        const Rows narrow{x + start * depth, depth};
        if (kWideBlock == 0 || !is_worth_it_ || rows < kMinWideRows || (start + rows) * depth > kMaxWide) return narrow;
        if (values_.size() < (start + rows) * depth) values_.resize((start + rows) * depth);
        if (has_.size() <= static_cast<size_t>(start)) has_.resize(start + 1);
        float* wide = &values_[start * depth];
        if (!has_[start])
            for (size_t i = 0; i < rows * depth; i += 16) store(wide + i, load_bf16(narrow.x + i));
        has_[start] = true;
        return {narrow.x, depth, wide};
    }

  private:
    bool is_worth_it_ = false;
    std::vector<float> values_;
    std::vector<bool> has_;  // by a piece's first row
};

// y (rows, 32) = x (rows, 2 · pairs) times one tile w, or y += that. Of each pair the second input is multiplied first,
// as `fmadd_pairs` does.
template <bool add, class Prefetched, int rows>
inline void multiply_wide_block(const float* x, size_t x_stride, const bf16* w, int pairs, float* y, size_t y_stride,
                                Prefetched& lines) {
    Prefetched remaining = lines;  // a local copy stays in registers
    for (int first = 0; first < kTile; first += 16) {
        F32x16 sum[rows];
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) sum[row] = add ? load(y + row * y_stride + first) : F32x16{};
        const bf16* weights = w + 2 * first;
        for (int pair = 0; pair < pairs; pair++, weights += 2 * kTile) {
            remaining.prefetch_some();
            const U32x16 w_pairs = load_pairs(weights);
            const F32x16 w_second = as_f32(w_pairs & broadcast_u32(0xffff0000));
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++)
                sum[row] = fmadd(broadcast(x[row * x_stride + 2 * pair + 1]), w_second, sum[row]);
            const F32x16 w_first = as_f32(w_pairs << 16);
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++)
                sum[row] = fmadd(broadcast(x[row * x_stride + 2 * pair]), w_first, sum[row]);
        }
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) store(y + row * y_stride + first, sum[row]);
    }
    lines = remaining;
}

// y (rows, 32) = x (rows, 2 · pairs) times one tile, or y += that, in register blocks of nearly equal size.
template <bool add, class Prefetched, int max_block = kWideBlock>
inline void multiply_wide(const float* x, size_t x_stride, int rows, const bf16* w, int pairs, float* y,
                          size_t y_stride, Prefetched lines) {
    static constexpr auto kByRows = []<int... rows>(std::integer_sequence<int, rows...>) {
        return std::array{multiply_wide_block<add, Prefetched, rows + 1>...};
    }(std::make_integer_sequence<int, max_block>{});
    while (rows > 0) {
        const int blocks = (rows + max_block - 1) / max_block;
        const int block = (rows + blocks - 1) / blocks;
        kByRows[block - 1](x, x_stride, w, pairs, y, y_stride, lines);
        x += block * x_stride;
        y += block * y_stride;
        rows -= block;
    }
}
