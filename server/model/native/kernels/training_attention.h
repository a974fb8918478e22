// Causal attention of one head over one text, and its gradients.
//
// A block of kQueries queries is multiplied with the keys up to the block's end. The backward pass recomputes the
// weights from queries and keys, so no weights are stored.
#pragma once
#include "attention.h"
#include "panels.h"

constexpr int kQueries = 32;  // per block

struct TextScratch {  // one thread's
    Panel k, v, k_columns, panel;
    Aligned<float> scores, d_weights, y;
    Aligned<bf16> weights, d_scores, transposed;
};

struct Text {  // one head's queries, keys and values: (length, dim), rows `stride` numbers apart
    const bf16 *q, *k, *v;
    size_t stride;
    int length, dim;

    int tiles() const { return (length + kTile - 1) / kTile; }
    float scale() const { return 1.0f / std::sqrt(static_cast<float>(dim)); }
};

// Packs x (length, dim) into consecutive tiles, whose outputs are rows of x.
inline uint32_t* pack_all_rows(const bf16* x, const Text& text, Panel& panel) {
    uint32_t* tiles = room(panel, static_cast<size_t>(text.tiles()) * text.dim / 2 * kTile);
    for (int tile = 0; tile < text.tiles(); tile++)
        pack_rows(x + tile * kTile * text.stride, text.stride, std::min(kTile, text.length - tile * kTile), text.dim,
                  tiles + static_cast<size_t>(tile) * text.dim / 2 * kTile);
    return tiles;
}
// Packs x (length, dim) into consecutive tiles, whose outputs are columns of x.
inline uint32_t* pack_all_columns(const bf16* x, const Text& text, Panel& panel) {
    const size_t size = static_cast<size_t>(text.length + 1) / 2 * kTile;
    uint32_t* tiles = room(panel, text.dim / kTile * size);
    for (int tile = 0; tile < text.dim / kTile; tile++)
        pack_columns(x + tile * kTile, text.stride, text.length, tiles + tile * size);
    return tiles;
}

// y (rows, width) = x (rows, dim) times packed rows; width is `keys`, rounded up to a multiple of 32.
inline void multiply_by_rows(const bf16* x, size_t stride, int rows, const uint32_t* panel, int keys, int dim, float* y,
                             int width) {
    for (int tile = 0; tile * kTile < keys; tile++)
        multiply(x, stride, rows, panel + static_cast<size_t>(tile) * dim / 2 * kTile, dim / 2, y + tile * kTile,
                 width);
}

// y (rows, dim) = x (rows, keys) times packed columns. If `keys` is odd, the next number of each row is zero.
inline void multiply_by_columns(const bf16* x, int width, int rows, const uint32_t* panel, int keys, const Text& text,
                                float* y, size_t y_stride) {
    const size_t size = static_cast<size_t>(text.length + 1) / 2 * kTile;
    for (int tile = 0; tile < text.dim / kTile; tile++)
        multiply(x, width, rows, panel + tile * size, (keys + 1) / 2, y + tile * kTile, y_stride);
}

// out (length, dim) = softmax(q Kᵀ / √dim) V, rows `out_stride` numbers apart.
inline void attend_text(const Text& text, bf16* out, size_t out_stride, TextScratch& scratch) {
    const uint32_t* k = pack_all_rows(text.k, text, scratch.k);
    const uint32_t* v = pack_all_columns(text.v, text, scratch.v);
    float* y = room(scratch.y, kQueries * text.dim);
    for (int start = 0; start < text.length; start += kQueries) {
        const int rows = std::min(kQueries, text.length - start), keys = start + rows;
        const int width = (keys + kTile - 1) / kTile * kTile;
        float* scores = room(scratch.scores, rows * width);
        bf16* weights = room(scratch.weights, rows * width);
        multiply_by_rows(text.q + start * text.stride, text.stride, rows, k, keys, text.dim, scores, width);
        float sums[kQueries];
        for (int row = 0; row < rows; row++) {
            bf16* row_weights = &weights[row * width];
            sums[row] = exponentials(&scores[row * width], start + row + 1, text.scale(),
                                     [=](int i, F32x16 x) { store_bf16(row_weights + i, x); });
            std::fill(row_weights + (start + row + 16) / 16 * 16, row_weights + width, 0);
        }
        multiply_by_columns(weights, width, rows, v, keys, text, y, text.dim);
        for (int row = 0; row < rows; row++)
            for (int i = 0; i < text.dim; i += 16)
                store_bf16(out + (start + row) * out_stride + i,
                           load(&y[row * text.dim + i]) * broadcast(1 / sums[row]));
    }
}

// Gradients dq, dk and dv (length, dim), rows `stride` numbers apart, given d_out.
inline void attend_text_backward(const Text& text, const bf16* d_out, size_t d_out_stride, float* dq, float* dk,
                                 float* dv, size_t stride, TextScratch& scratch) {
    const uint32_t* k = pack_all_rows(text.k, text, scratch.k);
    const uint32_t* v = pack_all_rows(text.v, text, scratch.v);
    const uint32_t* k_columns = pack_all_columns(text.k, text, scratch.k_columns);
    uint32_t* panel = room(scratch.panel, kQueries / 2 * kTile);
    for (int start = 0; start < text.length; start += kQueries) {
        const int rows = std::min(kQueries, text.length - start), keys = start + rows;
        const int width = (keys + kTile - 1) / kTile * kTile;
        const bf16 *q = text.q + start * text.stride, *d_out_rows = d_out + start * d_out_stride;
        float *scores = room(scratch.scores, rows * width), *d_weights = room(scratch.d_weights, rows * width);
        bf16 *weights = room(scratch.weights, rows * width), *d_scores = room(scratch.d_scores, rows * width);
        multiply_by_rows(q, text.stride, rows, k, keys, text.dim, scores, width);
        multiply_by_rows(d_out_rows, d_out_stride, rows, v, keys, text.dim, d_weights, width);
        for (int row = 0; row < rows; row++) {
            float *p = &scores[row * width], *dp = &d_weights[row * width];
            const float total =
                exponentials(p, start + row + 1, text.scale(), [=](int i, F32x16 x) { store(p + i, x); });
            const F32x16 inverse = broadcast(1 / total);
            const int seen = (start + row + 16) / 16 * 16;
            F32x16 sum{};
            for (int i = 0; i < seen; i += 16) {
                const F32x16 weight = load(p + i) * inverse;
                store(p + i, weight);
                store_bf16(&weights[row * width + i], weight);
                sum = fmadd(weight, load(dp + i), sum);
            }
            const F32x16 mean = broadcast(reduce_add(sum)), scale = broadcast(text.scale());
            for (int i = 0; i < seen; i += 16) {
                const F32x16 weight = load(p + i) * scale;
                store_bf16(&d_scores[row * width + i], weight * (load(dp + i) - mean));
            }
            std::fill(&weights[row * width] + seen, &weights[row * width] + width, 0);
            std::fill(&d_scores[row * width] + seen, &d_scores[row * width] + width, 0);
        }
        multiply_by_columns(d_scores, width, rows, k_columns, keys, text, dq + start * stride, stride);
        bf16* x_T = room(scratch.transposed, width * kQueries);
        // sums (keys, dim) += xᵀ y, for x (rows, keys) and y (rows, dim).
        auto add_transposed = [&](const bf16* x, const bf16* y, size_t y_stride, float* sums) {
            transpose(x, width, rows, width, x_T, kQueries);
            for (int i = 0; i < text.dim; i += kTile) {
                pack_columns(y + i, y_stride, rows, panel);
                multiply<true>(x_T, kQueries, start, panel, (rows + 1) / 2, sums + i, stride);
                // The block's own keys have no gradient yet: theirs is assigned, not added.
                multiply(x_T + start * kQueries, kQueries, rows, panel, (rows + 1) / 2, sums + start * stride + i,
                         stride);
            }
        };
        add_transposed(d_scores, q, text.stride, dk);
        add_transposed(weights, d_out_rows, d_out_stride, dv);
    }
}
