// Products of rows that were widened to 32 bits a number, for processors that multiply no 16-bit pairs.
//
// These widen each number of x when they multiply it, for each tile anew, which takes registers and as many
// instructions as half of the multiplications. Where many tiles meet the same rows these are widened once: then six
// rows of sums fit into AVX2's registers, where four did. Each sum is the very one of `add_pairs`.
#pragma once
#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "../numbers.h"

constexpr int kWideBlock = simd::kWideSums;    // rows of a register block of half a tile
constexpr int kFewestWide = kWideBlock - 1;    // rows that gain by it: these are one block, where they were two
constexpr int kFewestTiles = 4;                // that rows are widened for
constexpr size_t kMostWide = size_t{4} << 20;  // numbers that are, of a phase in a thread

struct Rows {  // of 16-bit numbers, `stride` of them apart
    const bf16* x;
    size_t stride;
    const float* wide = nullptr;  // the same numbers, as far apart; null where they weren't widened
    Rows from(int row) const { return {x + row * stride, stride, wide == nullptr ? nullptr : wide + row * stride}; }
};

// The rows of a phase's x that one thread met, widened.
class WideRows {
  public:
    // A phase begins, in which this thread multiplies about so many tiles.
    void begin(int64_t tiles) { is_worth_it_ = tiles >= kFewestTiles, has_.clear(); }

    // x (·, depth) from row `start` on: in a phase always the same pieces of the same x.
    Rows rows(const bf16* x, size_t depth, int start, int rows) {
        const Rows found{x + start * depth, depth};
        if (kWideBlock == 0 || !is_worth_it_ || rows < kFewestWide || (start + rows) * depth > kMostWide) return found;
        if (values_.size() < (start + rows) * depth) values_.resize((start + rows) * depth);
        if (has_.size() <= (size_t)start) has_.resize(start + 1);
        float* to = &values_[start * depth];
        if (!has_[start])
            for (size_t i = 0; i < rows * depth; i += 16) store(to + i, load_bf16(found.x + i));
        has_[start] = true;
        return {found.x, depth, to};
    }

  private:
    bool is_worth_it_ = false;
    std::vector<float> values_;
    std::vector<bool> has_;  // by their first row
};

template <bool add, class Prefetched, int rows>
inline void multiply_wide_block(const float* x, size_t x_stride, const bf16* w, int pairs, float* y, size_t y_stride,
                                Prefetched& lines) {
    Prefetched left = lines;
    for (int first = 0; first < kTile; first += 16) {
        F32x16 sum[rows];
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) sum[row] = add ? load(y + row * y_stride + first) : F32x16{};
        const bf16* of = w + 2 * first;
        for (int pair = 0; pair < pairs; pair++, of += 2 * kTile) {
            left.prefetch_some();
            const U32x16 both = load_u32(of);
            const F32x16 second = as_f32(both & broadcast_u32(0xffff0000));
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++)
                sum[row] = fmadd(broadcast(x[row * x_stride + 2 * pair + 1]), second, sum[row]);
            const F32x16 one = as_f32(both << 16);
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++)
                sum[row] = fmadd(broadcast(x[row * x_stride + 2 * pair]), one, sum[row]);
        }
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) store(y + row * y_stride + first, sum[row]);
    }
    lines = left;
}

// y (rows, 32) = x (rows, 2 · pairs) times one tile, or that added to it.
template <bool add, class Prefetched, int block = kWideBlock>
inline void multiply_wide(const float* x, size_t x_stride, int rows, const bf16* w, int pairs, float* y,
                          size_t y_stride, Prefetched lines) {
    static constexpr auto kByRows = []<int... rows>(std::integer_sequence<int, rows...>) {
        return std::array{multiply_wide_block<add, Prefetched, rows + 1>...};
    }(std::make_integer_sequence<int, block>{});
    while (rows > 0) {
        const int blocks = (rows + block - 1) / block, now = (rows + blocks - 1) / blocks;
        kByRows[now - 1](x, x_stride, w, pairs, y, y_stride, lines);
        x += now * x_stride, y += now * y_stride, rows -= now;
    }
}
