// The products of training and their gradients: y = x Wᵀ + (x Aᵀ) B, with x Aᵀ called lora_hidden.
//
// W (out, in) is a base's matrix, A (rows of A, in) and B (rows of A, out) are a group's adapters. Tiles are packed
// when they are needed. Functions get whole matrices, and compute rows [start, start + rows). Dropout applies to A's
// input alone: it zeroes features of x and multiplies the others by a factor.
#pragma once
#include "dropout.h"
#include "layers.h"
#include "panels.h"

constexpr int kProductRows = 512;  // rows that are multiplied with a packed tile, at most

struct ProductScratch {  // one thread's
    Panel panel, low_rank_panel, columns;
    WideRows wide, wide_turned;  // of the phase's x or dy, and of dyᵀ (out, tokens)
    Aligned<float> low_rank, share;
};

// The module that has an output column, or null.
inline const TrainModule* module_at(const TrainGroup& lora, int64_t column) {
    for (int64_t i = 0; i < lora.num_modules; i++) {
        const TrainModule& module = lora.modules[i];
        if (column >= module.out_start && column < module.out_start + module.out_features) return &module;
    }
    return nullptr;
}

// y (rows, outputs) = x (rows, depth) times `outputs` rows of w (·, depth), at most 32.
inline void multiply_low_rank(const bf16* w, int64_t w_stride, int outputs, int64_t depth, const bf16* x,
                              int64_t x_stride, int rows, bf16* y, int64_t y_stride, ProductScratch& scratch) {
    float* sums = room(scratch.low_rank, rows * kTile);
    uint32_t* panel = room(scratch.low_rank_panel, depth / 2 * kTile);
    if (outputs <= 16 && !has_amx()) {
        pack_rows(w, w_stride, outputs, static_cast<int>(depth), panel, 16);
        multiply_narrow(x, x_stride, rows, panel, static_cast<int>(depth) / 2, sums, kTile);
    } else {
        pack_rows(w, w_stride, outputs, static_cast<int>(depth), panel);
        multiply(x, x_stride, rows, panel, static_cast<int>(depth) / 2, sums, kTile);
    }
    for (int row = 0; row < rows; row++) round_to_bf16(sums + row * kTile, outputs, y + row * y_stride);
}

// lora_hidden (tokens, rows of A) = x Aᵀ
inline void shrink(const TrainGroup& lora, const bf16* x, int64_t in, int start, int rows, bf16* lora_hidden,
                   ProductScratch& scratch) {
    for (int64_t row = 0; row < lora.rows; row += kTile)
        multiply_low_rank(lora.a + row * in, in, static_cast<int>(std::min<int64_t>(kTile, lora.rows - row)), in,
                          x + start * in, in, rows, lora_hidden + start * lora.rows + row, lora.rows, scratch);
}

// d_lora_hidden (tokens, rows of A) = dy Bᵀ
inline void shrink_backward(const TrainGroup& lora, const bf16* dy, int64_t out, int start, int rows,
                            bf16* d_lora_hidden, ProductScratch& scratch) {
    for (int64_t i = 0; i < lora.num_modules; i++) {
        const TrainModule& module = lora.modules[i];
        for (int64_t row = 0; row < module.rank; row += kTile)
            multiply_low_rank(lora.b + (module.row + row) * out + module.out_start, out,
                              static_cast<int>(std::min<int64_t>(kTile, module.rank - row)), module.out_features,
                              dy + start * out + module.out_start, out, rows,
                              d_lora_hidden + start * lora.rows + module.row + row, lora.rows, scratch);
    }
}

// y (rows, 32) = the outputs [column, column + 32) of x Wᵀ + lora_hidden B.
inline void product(const bf16* w, int64_t in, int64_t out, const TrainGroup& lora, const bf16* x,
                    const bf16* lora_hidden, int64_t column, int start, int rows, float* y, int64_t y_stride,
                    ProductScratch& scratch) {
    uint32_t* panel = room(scratch.panel, in / 2 * kTile);
    pack_rows(w + column * in, in, kTile, static_cast<int>(in), panel);
    multiply_and_prefetch(scratch.wide.rows(x, in, start, rows), rows, panel, static_cast<int>(in) / 2, y, y_stride,
                          w + (column + kTile) * in, kTile, static_cast<int>(in));
    const TrainModule* module = module_at(lora, column);
    if (module == nullptr) return;
    panel = room(scratch.panel, module->rank / 2 * kTile);
    pack_columns(lora.b + module->row * out + column, out, static_cast<int>(module->rank), panel);
    multiply<true>(lora_hidden + start * lora.rows + module->row, lora.rows, rows, panel,
                   static_cast<int>(module->rank) / 2, y, y_stride);
}

// y (rows, 32) = the features [column, column + 32) of x's gradient, dy W + d_lora_hidden A. With dropout (`kept` isn't
// null), A's part is zero for dropped features, and times `factor` for kept ones.
inline void product_backward(const bf16* w, int64_t in, int64_t out, const TrainGroup& lora, const uint16_t* kept,
                             double factor, const bf16* dy, const bf16* d_lora_hidden, int64_t column, int start,
                             int rows, float* y, int64_t y_stride, ProductScratch& scratch) {
    uint32_t* panel = room(scratch.panel, std::max(out, lora.rows) / 2 * kTile);
    pack_columns(w + column, in, static_cast<int>(out), panel);
    multiply_and_prefetch(scratch.wide.rows(dy, out, start, rows), rows, panel, static_cast<int>(out) / 2, y, y_stride,
                          w + column + kTile, in, static_cast<int>(out));
    if (lora.rows == 0) return;
    const bf16* d_low_rank = d_lora_hidden + start * lora.rows;
    const int pairs = static_cast<int>(lora.rows) / 2;
    pack_columns(lora.a + column, in, static_cast<int>(lora.rows), panel);
    if (kept == nullptr) return multiply<true>(d_low_rank, lora.rows, rows, panel, pairs, y, y_stride);
    float* share = room(scratch.share, rows * kTile);
    multiply(d_low_rank, lora.rows, rows, panel, pairs, share, kTile);
    const F32x16 factors = broadcast(static_cast<float>(factor));
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < kTile; i += 16) {
            float* sum = y + row * y_stride + i;
            const F32x16 scaled = load(share + row * kTile + i) * factors;
            const Mask16 is_kept = kept[((start + row) * in + column + i) / 16];
            store(sum, choose(is_kept, load(sum) + scaled, load(sum)));
        }
}

// y (outputs, 32) = columns [column, column + 32) of x_T (outputs, tokens) times dy (tokens, out), or y += that: the
// gradient of A, B or W. An odd number of tokens is padded with zeros.
template <bool add = false>
inline void multiply_over_tokens(const Rows& x_T, int outputs, const bf16* dy, int64_t out, int64_t column, int tokens,
                                 float* y, int64_t y_stride, ProductScratch& scratch) {
    uint32_t* panel = room(scratch.columns, (tokens + 1) / 2 * kTile);
    pack_columns(dy + column, out, tokens, panel);
    multiply<add>(x_T, outputs, reinterpret_cast<const bf16*>(panel), (tokens + 1) / 2, y, y_stride);
}

// sums (rows, columns) += scale · y
inline void add_scaled(const float* y, int64_t y_stride, int64_t rows, int64_t columns, float scale, float* sums,
                       int64_t sums_stride) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < columns; i++) {
            float& sum = sums[row * sums_stride + i];
            sum = std::fma(scale, y[row * y_stride + i], sum);
        }
}

// y (32, outputs) = the transpose of `multiply_over_tokens`' result; outputs is a multiple of 16.
inline void multiply_over_tokens_turned(const bf16* x_T, int64_t x_stride, int outputs, const bf16* dy, int64_t out,
                                        int64_t column, int tokens, float* y, int64_t y_stride,
                                        ProductScratch& scratch) {
    float* tile = room(scratch.low_rank, outputs * kTile);
    multiply_over_tokens({x_T, static_cast<size_t>(x_stride)}, outputs, dy, out, column, tokens, tile, kTile, scratch);
    for (int output = 0; output < outputs; output += 16)
        for (int half = 0; half < kTile; half += 16) {
            U32x16 r[16];
            for (int i = 0; i < 16; i++) r[i] = load_u32(tile + (output + i) * kTile + half);
            transpose16(r);
            for (int i = 0; i < 16; i++) store(y + (half + i) * y_stride + output, r[i]);
        }
}
