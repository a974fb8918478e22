// Causal attention of one head over one text, whose tokens lie one after the other, and its gradients.
//
// A block of queries meets the keys up to its own end, in products of matrices. Nothing but queries, keys and values is
// kept for the backward pass, which computes the weights again.
#pragma once
#include "attention.h"
#include "panels.h"

constexpr int kQueries = 32;  // of a block

struct TextScratch {  // of one thread
    Panel k, v, k_columns, panel;
    Aligned<float> scores, d_weights, y;
    Aligned<bf16> weights, d_scores, turned;
};

struct Text {  // one head's queries, keys and values: rows of `dim` numbers, `stride` apart
    const bf16 *q, *k, *v;
    size_t stride;
    int length, dim;

    int tiles() const { return (length + kTile - 1) / kTile; }
    float scale() const { return 1.0f / std::sqrt((float)dim); }
};

// Of many tiles, one after the other: outputs are the rows of x, or its columns.
inline uint32_t* pack_all_rows(const bf16* x, const Text& text, Panel& panel) {
    uint32_t* to = room(panel, (size_t)text.tiles() * text.dim / 2 * kTile);
    for (int tile = 0; tile < text.tiles(); tile++)
        pack_rows(x + tile * kTile * text.stride, text.stride, std::min(kTile, text.length - tile * kTile), text.dim,
                  to + (size_t)tile * text.dim / 2 * kTile);
    return to;
}
inline uint32_t* pack_all_columns(const bf16* x, const Text& text, Panel& panel) {
    const size_t size = (size_t)(text.length + 1) / 2 * kTile;
    uint32_t* to = room(panel, text.dim / kTile * size);
    for (int tile = 0; tile < text.dim / kTile; tile++)
        pack_columns(x + tile * kTile, text.stride, text.length, to + tile * size);
    return to;
}

// y (rows, keys up to a multiple of 32) = x (rows, dim) times packed rows.
inline void against_rows(const bf16* x, size_t stride, int rows, const uint32_t* panel, int keys, int dim, float* y,
                         int width) {
    for (int tile = 0; tile * kTile < keys; tile++)
        multiply(x, stride, rows, panel + (size_t)tile * dim / 2 * kTile, dim / 2, y + tile * kTile, width);
}

// y (rows, dim) = x (rows, keys), an odd number filled up with zeros, times packed columns.
inline void against_columns(const bf16* x, int width, int rows, const uint32_t* panel, int keys, const Text& text,
                            float* y, size_t y_stride) {
    const size_t size = (size_t)(text.length + 1) / 2 * kTile;
    for (int tile = 0; tile < text.dim / kTile; tile++)
        multiply(x, width, rows, panel + tile * size, (keys + 1) / 2, y + tile * kTile, y_stride);
}

// out (length, dim), rows `out_stride` apart.
inline void attend_text(const Text& text, bf16* out, size_t out_stride, TextScratch& scratch) {
    const uint32_t* k = pack_all_rows(text.k, text, scratch.k);
    const uint32_t* v = pack_all_columns(text.v, text, scratch.v);
    float* y = room(scratch.y, kQueries * text.dim);
    for (int start = 0; start < text.length; start += kQueries) {
        const int rows = std::min(kQueries, text.length - start), keys = start + rows;
        const int width = (keys + kTile - 1) / kTile * kTile;
        float* scores = room(scratch.scores, rows * width);
        bf16* weights = room(scratch.weights, rows * width);
        against_rows(text.q + start * text.stride, text.stride, rows, k, keys, text.dim, scores, width);
        float sums[kQueries];
        for (int row = 0; row < rows; row++) {
            bf16* to = &weights[row * width];
            sums[row] = exponentials(&scores[row * width], start + row + 1, text.scale(),
                                     [=](int i, F32x16 x) { store_bf16(to + i, x); });
            std::fill(to + (start + row + 16) / 16 * 16, to + width, 0);
        }
        against_columns(weights, width, rows, v, keys, text, y, text.dim);
        for (int row = 0; row < rows; row++)
            for (int i = 0; i < text.dim; i += 16)
                store_bf16(out + (start + row) * out_stride + i,
                           load(&y[row * text.dim + i]) * broadcast(1 / sums[row]));
    }
}

// Gradients dq, dk, dv (length, dim), rows `stride` apart, from that of out.
inline void attend_text_backward(const Text& text, const bf16* d_out, size_t d_out_stride, float* dq, float* dk,
                                 float* dv, size_t stride, TextScratch& scratch) {
    const uint32_t* k = pack_all_rows(text.k, text, scratch.k);
    const uint32_t* v = pack_all_rows(text.v, text, scratch.v);
    const uint32_t* k_columns = pack_all_columns(text.k, text, scratch.k_columns);
    uint32_t* panel = room(scratch.panel, kQueries / 2 * kTile);
    for (int start = 0; start < text.length; start += kQueries) {
        const int rows = std::min(kQueries, text.length - start), keys = start + rows;
        const int width = (keys + kTile - 1) / kTile * kTile;
        const bf16 *q = text.q + start * text.stride, *from = d_out + start * d_out_stride;
        float *scores = room(scratch.scores, rows * width), *d_weights = room(scratch.d_weights, rows * width);
        bf16 *weights = room(scratch.weights, rows * width), *d_scores = room(scratch.d_scores, rows * width);
        against_rows(q, text.stride, rows, k, keys, text.dim, scores, width);
        against_rows(from, d_out_stride, rows, v, keys, text.dim, d_weights, width);
        for (int row = 0; row < rows; row++) {
            float *p = &scores[row * width], *dp = &d_weights[row * width];
            const float total =
                exponentials(p, start + row + 1, text.scale(), [=](int i, F32x16 x) { store(p + i, x); });
            const F32x16 by = broadcast(1 / total);
            const int seen = (start + row + 16) / 16 * 16;
            F32x16 sum{};
            for (int i = 0; i < seen; i += 16) {
                F32x16 weight = load(p + i) * by;
                store(p + i, weight);
                store_bf16(&weights[row * width + i], weight);
                sum = fmadd(weight, load(dp + i), sum);
            }
            const F32x16 mean = broadcast(reduce_add(sum)), scale = broadcast(text.scale());
            for (int i = 0; i < seen; i += 16) {
                F32x16 weight = load(p + i) * scale;
                store_bf16(&d_scores[row * width + i], weight * (load(dp + i) - mean));
            }
            std::fill(&weights[row * width] + seen, &weights[row * width] + width, 0);
            std::fill(&d_scores[row * width] + seen, &d_scores[row * width] + width, 0);
        }
        against_columns(d_scores, width, rows, k_columns, keys, text, dq + start * stride, stride);
        bf16* turned = room(scratch.turned, width * kQueries);
        auto add_turned = [&](const bf16* x, const bf16* y, size_t y_stride, float* to) {
            transpose(x, width, rows, width, turned, kQueries);
            for (int i = 0; i < text.dim; i += kTile) {
                pack_columns(y + i, y_stride, rows, panel);
                multiply<true>(turned, kQueries, start, panel, (rows + 1) / 2, to + i, stride);
                multiply(turned + start * kQueries, kQueries, rows, panel, (rows + 1) / 2, to + start * stride + i,
                         stride);  // of the keys that no query has met before
            }
        };
        add_turned(d_scores, q, text.stride, dk);
        add_turned(weights, from, d_out_stride, dv);
    }
}
