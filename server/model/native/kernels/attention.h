// Attention of a step's tokens over a paged cache of keys and values: softmax(q Kᵀ / √head_dim) V.
//
// The cache stores keys and values in the layout that products read. The query heads of a kv head are rows of one
// product, and so are several tokens of a sequence, since each loaded key or value is used once for each row. A query's
// result doesn't depend on the other rows, nor on when its keys and values were stored: each score is one sum over the
// dimensions in order, and each output is one sum over the positions in order.
#pragma once
#include <array>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "matrix.h"

struct AttentionScratch {  // one thread's
    std::vector<float> scores, total;
    std::vector<bf16> weights;
    std::vector<const bf16*> pieces;  // addresses of kPositions keys or values each, in the order of reads
};

// The keys that the thread reads next; the first of them are prefetched.
struct NextKeys {
    const int32_t* blocks;
    int count;  // pieces of 16 positions
    int kv_head;
};

constexpr int kPiecesAhead = 4;  // prefetch distance of keys and values, in pieces of 16 positions

// One layer's cache. A block is (kv_heads, block_size / 16, 16 · head_dim), and blocks are `stride` numbers apart. The
// keys of 16 positions are [head_dim / 2][16][2]: pairs of dimensions. The values are [head_dim / 32][8][32][2]: pairs
// of positions.
struct CacheView {
    bf16 *k, *v;
    int block_size, kv_heads, head_dim;
    size_t stride;

    // The offset of the sequence's positions [16 · index, 16 · index + 16).
    size_t offset(const int32_t* blocks, int index, int kv_head) const {
        const int pieces = block_size / kPositions;
        return blocks[index / pieces] * stride +
               static_cast<size_t>(kv_head * pieces + index % pieces) * kPositions * head_dim;
    }

    void put_key(const int32_t* blocks, int position, int kv_head, const float* key) const {
        bf16* column = k + offset(blocks, position / kPositions, kv_head) + position % kPositions * 2;
        for (int d = 0; d < head_dim; d += 16) {
            bf16 narrow[16];
            store_bf16(narrow, load(key + d));
            for (int i = 0; i < 16; i += 2) memcpy(column + (d + i) * kPositions, narrow + i, 2 * sizeof(bf16));
        }
    }

    void put_value(const int32_t* blocks, int position, int kv_head, const float* value) const {
        const int inside = position % kPositions;
        bf16* row = v + offset(blocks, position / kPositions, kv_head) + inside / 2 * kTile * 2 + inside % 2;
        for (int d = 0; d < head_dim; d += 16) {
            bf16 narrow[16];
            store_bf16(narrow, load(value + d));
            bf16* tile = row + d / kTile * kPositions * kTile + d % kTile * 2;
            for (int i = 0; i < 16; i++) tile[2 * i] = narrow[i];
        }
    }
};

// Calls keep(i, x) with x = e^(scale · (score - max)) for scores [i, i + 16) of the first `count`, in order; x is 0
// after the last score. Returns the sum. `keep` may overwrite the scores that it gets.
template <class Keep>
inline float exponentials(const float* scores, int count, float scale, Keep keep) {
    const F32x16 none = broadcast(-std::numeric_limits<float>::infinity());
    F32x16 greatest = none;
    for (int i = 0; i < count; i += 16)
        greatest =
            max(greatest, choose(first_lanes(count - i), as_f32(load_lanes(first_lanes(count - i), scores + i)), none));
    const F32x16 shift = broadcast(reduce_max(greatest)), scales = broadcast(scale);
    F32x16 sum{};
    for (int i = 0; i < count; i += 16) {
        F32x16 x = exp16(scales * (load(scores + i) - shift));
        x = choose(first_lanes(count - i), x, F32x16{});
        keep(i, x);
        sum = sum + x;
    }
    return reduce_add(sum);
}

// Scores y (rows, 32) = q (rows, 2 · pairs) times the keys of two pieces of 16 positions. Two pieces at `ahead` are
// prefetched meanwhile.
template <int rows>
inline void score_block(const bf16* q, size_t q_stride, int pairs, const bf16* const* keys, const bf16* const* ahead,
                        float* y, size_t y_stride) {
    F32x16 sum[rows][2];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) sum[row][0] = sum[row][1] = F32x16{};
    for (int pair = 0; pair < pairs; pair++) {
        const size_t offset = static_cast<size_t>(pair) * 2 * kPositions;
        prefetch_line(ahead[0] + offset);
        prefetch_line(ahead[1] + offset);
        const U32x16 k0 = load_pairs(keys[0] + offset), k1 = load_pairs(keys[1] + offset);
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            const U32x16 x_pair = broadcast_pair(q + row * q_stride + 2 * pair);
            sum[row][0] = fmadd_pairs(x_pair, k0, sum[row][0]);
            sum[row][1] = fmadd_pairs(x_pair, k1, sum[row][1]);
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) {
        store(y + row * y_stride, sum[row][0]);
        store(y + row * y_stride + kPositions, sum[row][1]);
    }
}

// y (rows, 32) = weights (rows, positions) times 32 dimensions of the values, which begin at offset `tile` in each
// piece of 16 positions. Memory after the last position may contain anything. For each pair of positions, `lines` lines
// of a later piece are prefetched, from its offset `fetched` on.
template <int rows>
inline void mix_block(const bf16* weights, size_t w_stride, int positions, const bf16* const* values, size_t tile,
                      size_t fetched, int lines, float* y, size_t y_stride) {
    F32x16 sum[rows][2];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) sum[row][0] = sum[row][1] = F32x16{};
    const U32x16 first_of_pair = broadcast_u32(0xffff);
    for (int start = 0; start < positions; start += kPositions) {
        const bf16* v = values[start / kPositions] + tile;
        const bf16* ahead = values[start / kPositions + kPiecesAhead] + fetched;
        for (int i = start; i < std::min(start + kPositions, positions); i += 2, v += 2 * kTile) {
            for (int line = 0; line < lines; line++, ahead += kTile) prefetch_line(ahead);
            U32x16 v0 = load_pairs(v), v1 = load_pairs(v + kTile);
            if (i + 1 == positions) {
                v0 = v0 & first_of_pair;
                v1 = v1 & first_of_pair;
            }
#pragma GCC unroll 12
            for (int row = 0; row < rows; row++) {
                const U32x16 x_pair = broadcast_pair(weights + row * w_stride + i);
                sum[row][0] = fmadd_pairs(x_pair, v0, sum[row][0]);
                sum[row][1] = fmadd_pairs(x_pair, v1, sum[row][1]);
            }
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) {
        store(y + row * y_stride, sum[row][0]);
        store(y + row * y_stride + 16, sum[row][1]);
    }
}

// Scores y (rows, 16 · count) by AMX, with q (rows, dim) and `count` pieces of keys, rounded up to an even number.
inline void score_amx(const bf16* q, int rows, int dim, const bf16* const* keys, int count, float* y, size_t y_stride) {
    for (int start = 0; start < rows; start += 2 * kAmxRows) {
        AmxBlock block(std::min(rows - start, 2 * kAmxRows));
        for (int i = 0; i < count; i += 2) {
            block.zero();
            for (int d = 0; d < dim; d += 2 * kAmxPairs) {
                for (int line = 0; line < 2 * kAmxPairs * kPositions; line += 32) {
                    prefetch_line(keys[i + kPiecesAhead] + d * kPositions + line);
                    prefetch_line(keys[i + kPiecesAhead + 1] + d * kPositions + line);
                }
                block.add(q + static_cast<size_t>(start) * dim + d, dim, keys[i] + d * kPositions,
                          keys[i + 1] + d * kPositions, 2 * kPositions);
            }
            block.store(y + start * y_stride + i * kPositions, y_stride);
        }
    }
}

// Dimensions [first_dim, last_dim) of y (rows, dim) = weights (rows, positions) times the values, by AMX. Weights are 0
// after a row's own position.
inline void mix_amx(const bf16* weights, size_t w_stride, int rows, int positions, const bf16* const* values,
                    int first_dim, int last_dim, float* y, int dim) {
    const int whole = positions / kPositions, rest = positions % kPositions;
    for (int d = first_dim; d < last_dim; d += kTile) {
        const size_t tile = static_cast<size_t>(d) * kPositions;
        alignas(64) bf16 last[kPositions * kTile] = {};  // the last piece, zero after the last position
        for (int i = 0; i < (rest + 1) / 2 * 2 * kTile; i++)
            last[i] = i / (2 * kTile) * 2 + i % 2 < rest ? values[whole][tile + i] : static_cast<bf16>(0);
        for (int start = 0; start < rows; start += 2 * kAmxRows) {
            AmxBlock block(std::min(rows - start, 2 * kAmxRows), kPositions / 2);
            block.zero();
            for (int i = 0; i < whole + (rest > 0); i++) {
                const bf16* v = i < whole ? values[i] + tile : last;
                for (int line = 0; line < kPositions * kTile; line += 32)
                    prefetch_line(values[i + kPiecesAhead] + tile + line);
                block.add(weights + start * w_stride + i * kPositions, w_stride, v, v + kTile, 2 * kTile);
            }
            block.store(y + static_cast<size_t>(start) * dim + d, dim);
        }
    }
}

// Calls kernel<n>(first row) for blocks of n rows of nearly equal size.
template <class Kernel>
inline void by_blocks(int rows, Kernel kernel) {
    constexpr int kBlock = simd::kSums / 2;
    const int blocks = (rows + kBlock - 1) / kBlock;
    for (int block = 0, row = 0; block < blocks; block++) {
        const int count = (rows - row + blocks - block - 1) / (blocks - block);
        [&]<int... counts>(std::integer_sequence<int, counts...>) {
            (void)((count == counts + 1 && (kernel.template operator()<counts + 1>(row), true)) || ...);
        }(std::make_integer_sequence<int, kBlock>{});
        row += count;
    }
}

// Queries of one kv head: `group` rows (query heads) per token, for consecutive tokens from `position` on. A token sees
// the positions up to its own.
struct Attention {
    const CacheView& cache;
    const int32_t* blocks;
    int kv_head, rows, group, position;

    int length() const { return position + (rows - 1) / group + 1; }
    int count() const { return (length() + kPositions - 1) / kPositions; }  // pieces of 16 positions
    int width() const { return (count() + 1) / 2 * 2 * kPositions; }        // scores per row
    bool by_amx() const { return cache.head_dim % (2 * kAmxPairs) == 0 && has_amx(); }

    // Returns the addresses of the pieces of keys, then of values, then of the next keys. If the number of pieces is
    // odd, the last keys are multiplied together with the first values; those scores aren't used.
    const bf16* const* pieces(const NextKeys& next, AttentionScratch& scratch) const {
        const int count = this->count();
        const bf16** pieces = room(scratch.pieces, 2 * count + kPiecesAhead + 1);
        for (int i = 0; i < count; i++) {
            const size_t offset = cache.offset(blocks, i, kv_head);
            pieces[i] = cache.k + offset;
            pieces[count + i] = cache.v + offset;
        }
        for (int i = 0; i <= kPiecesAhead; i++)
            pieces[2 * count + i] = cache.k + cache.offset(next.blocks, std::min(i, next.count - 1), next.kv_head);
        return pieces;
    }

    // Computes the scores (rows, width) of q (rows, head_dim) for the pieces [first, last) of keys; `first` is even.
    void score(const bf16* q, const bf16* const* pieces, int first, int last, float* scores) const {
        const int dim = cache.head_dim, width = this->width();
        if (by_amx()) return score_amx(q, rows, dim, pieces + first, last - first, scores + first * kPositions, width);
        for (int i = first; i < last; i += 2)
            by_blocks(rows, [&]<int block>(int row) {
                score_block<block>(q + static_cast<size_t>(row) * dim, dim, dim / 2, pieces + i,
                                   pieces + i + kPiecesAhead,
                                   scores + static_cast<size_t>(row) * width + i * kPositions, width);
            });
    }

    // Computes the dimensions [first_dim, last_dim) of out (rows, head_dim) from all scores.
    void mix(const float* scores, const bf16* const* pieces, int first_dim, int last_dim, float* out,
             AttentionScratch& scratch) const {
        const int dim = cache.head_dim, width = this->width();
        const bf16* const* values = pieces + count();
        bf16* weights = room(scratch.weights, static_cast<size_t>(rows) * width);
        float* total = room(scratch.total, rows);
        for (int row = 0; row < rows; row++) {
            const int seen = position + row / group + 1;
            bf16* row_weights = weights + static_cast<size_t>(row) * width;
            total[row] =
                exponentials(scores + static_cast<size_t>(row) * width, seen, 1.0f / std::sqrt(static_cast<float>(dim)),
                             [=](int i, F32x16 x) { store_bf16(row_weights + i, x); });
            for (int i = (seen + 15) / 16 * 16; i < width; i += 16) store_bf16(row_weights + i, F32x16{});
        }
        // Mixes all rows at once. Weights are 0 after a row's own position, but 0 times an infinite value is NaN: if a
        // later token's value may be infinite, each token's rows are mixed again by themselves.
        for (int first = 0, last = rows, positions = length(); first < rows;) {
            const bf16* block_weights = weights + static_cast<size_t>(first) * width;
            float* mixed = out + static_cast<size_t>(first) * dim;
            if (by_amx())
                mix_amx(block_weights, width, last - first, positions, values, first_dim, last_dim, mixed, dim);
            for (int d = first_dim; !by_amx() && d < last_dim; d += kTile)
                by_blocks(last - first, [&]<int block>(int row) {
                    mix_block<block>(block_weights + static_cast<size_t>(row) * width, width, positions, values,
                                     static_cast<size_t>(d) * kPositions, static_cast<size_t>(first_dim) * kPositions,
                                     d == first_dim && row == 0 ? (last_dim - first_dim) / 16 : 0,
                                     mixed + static_cast<size_t>(row) * dim + d, dim);
                });
            for (int row = first; row < last; row++) {
                const F32x16 scale = broadcast(1.0f / total[row]);
                for (int d = first_dim; d < last_dim; d += 16)
                    store(out + row * dim + d, load(out + row * dim + d) * scale);
            }
            const bool is_whole = last - first == rows;
            // The first row has read every value, so it has a NaN if any value is infinite.
            if (is_whole && (rows <= group || is_finite(out, first_dim, last_dim))) return;
            first = is_whole ? 0 : last;
            last = first + group;
            positions = position + first / group + 1;
        }
    }

  private:
    static bool is_finite(const float* x, int first, int last) {
        F32x16 sum{};
        for (int i = first; i < last; i += 16) sum = fmadd(load(x + i), F32x16{}, sum);
        return reduce_add(sum) == 0;
    }
};

// out (rows, head_dim) = the attention of q (rows, head_dim).
inline void attend(const Attention& attention, const bf16* q, const NextKeys& next, float* out,
                   AttentionScratch& scratch) {
    const bf16* const* pieces = attention.pieces(next, scratch);
    float* scores = room(scratch.scores, static_cast<size_t>(attention.rows) * attention.width());
    attention.score(q, pieces, 0, attention.count(), scores);
    attention.mix(scores, pieces, 0, attention.cache.head_dim, out, scratch);
}
