// Attention of a step's tokens over a paged cache of keys and values; queries are grouped by kv head.
//
// Keys and values lie in the cache as products read them. A query's result doesn't depend on how many are computed
// with it, nor on when its keys and values were put there: each score is one sum over the dimensions in order, each
// output one sum over the positions in order.
#pragma once
#include <array>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "matrix.h"

struct AttentionScratch {  // of one thread
    std::vector<float> scores, total;
    std::vector<bf16> weights;
    std::vector<const bf16*> pieces;  // where each `kPositions` lie, in the order in which they are read
};

// Keys that are read after those of a call: the first of them are prefetched.
struct NextKeys {
    const int32_t* blocks;
    int count;  // of 16 positions each
    int kv_head;
};

constexpr int kPiecesAhead = 4;  // by which keys and values are prefetched, of 16 positions each

// One layer's: each block (kv_heads, block_size / 16, 16 · head_dim), `stride` numbers behind the one before. Of 16
// positions the keys lie as [head_dim / 2][16][2], the values as [head_dim / 32][8][32][2], two positions side by side.
struct CacheView {
    bf16 *k, *v;
    int block_size, kv_heads, head_dim;
    size_t stride;

    // Where the sequence's positions [16 · index, 16 · index + 16) begin.
    size_t offset(const int32_t* blocks, int index, int kv_head) const {
        const int each = block_size / kPositions;
        return blocks[index / each] * stride + (size_t)(kv_head * each + index % each) * kPositions * head_dim;
    }

    void put_key(const int32_t* blocks, int position, int kv_head, const float* key) const {
        bf16* to = k + offset(blocks, position / kPositions, kv_head) + position % kPositions * 2;
        for (int d = 0; d < head_dim; d += 16) {
            bf16 narrow[16];
            store_bf16(narrow, load(key + d));
            for (int i = 0; i < 16; i += 2) memcpy(to + (d + i) * kPositions, narrow + i, 2 * sizeof(bf16));
        }
    }

    void put_value(const int32_t* blocks, int position, int kv_head, const float* value) const {
        const int inside = position % kPositions;
        bf16* to = v + offset(blocks, position / kPositions, kv_head) + inside / 2 * kTile * 2 + inside % 2;
        for (int d = 0; d < head_dim; d += 16) {
            bf16 narrow[16];
            store_bf16(narrow, load(value + d));
            bf16* tile = to + d / kTile * kPositions * kTile + d % kTile * 2;
            for (int i = 0; i < 16; i++) tile[2 * i] = narrow[i];
        }
    }
};

// Calls keep(i, x) with e^(scale · (score - max)) of each 16 of the first `count` scores in turn, of which those behind
// the last are 0; returns their sum. What is kept may lie where its scores do.
template <class Keep>
inline float exponentials(const float* scores, int count, float scale, Keep keep) {
    const F32x16 none = broadcast(-std::numeric_limits<float>::infinity());
    F32x16 top = none;
    for (int i = 0; i < count; i += 16)
        top = max(top, choose(first_lanes(count - i), as_f32(load_lanes(first_lanes(count - i), scores + i)), none));
    const F32x16 shift = broadcast(reduce_max(top)), by = broadcast(scale);
    F32x16 sum{};
    for (int i = 0; i < count; i += 16) {
        F32x16 x = exp16(by * (load(scores + i) - shift));
        x = choose(first_lanes(count - i), x, F32x16{});
        keep(i, x);
        sum = sum + x;
    }
    return reduce_add(sum);
}

// Scores (rows, 32): q (rows, 2 · pairs) times the keys of twice 16 positions. `ahead`: what is prefetched meanwhile.
template <int rows>
inline void score_block(const bf16* q, size_t q_stride, int pairs, const bf16* const* keys, const bf16* const* ahead,
                        float* y, size_t y_stride) {
    F32x16 sum[rows][2];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) sum[row][0] = sum[row][1] = F32x16{};
    for (int pair = 0; pair < pairs; pair++) {
        const size_t at = (size_t)pair * 2 * kPositions;
        prefetch_line(ahead[0] + at);
        prefetch_line(ahead[1] + at);
        U32x16 k0 = load_pairs(keys[0] + at), k1 = load_pairs(keys[1] + at);
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            uint32_t two;
            memcpy(&two, q + row * q_stride + 2 * pair, 4);
            auto both = broadcast_u32(two);
            sum[row][0] = fmadd_pairs(both, k0, sum[row][0]);
            sum[row][1] = fmadd_pairs(both, k1, sum[row][1]);
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) {
        store(y + row * y_stride, sum[row][0]);
        store(y + row * y_stride + kPositions, sum[row][1]);
    }
}

// y (rows, 32) = weights (rows, positions) times 32 dimensions of the values, from `tile` on in each 16 positions.
// What lies behind the last position may be anything. `lines` of what comes next are prefetched for each two positions,
// from `fetched` on in each 16.
template <int rows>
inline void mix_block(const bf16* weights, size_t w_stride, int positions, const bf16* const* values, size_t tile,
                      size_t fetched, int lines, float* y, size_t y_stride) {
    F32x16 sum[rows][2];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) sum[row][0] = sum[row][1] = F32x16{};
    const U32x16 first_of_two = broadcast_u32(0xffff);
    for (int start = 0; start < positions; start += kPositions) {
        const bf16* v = values[start / kPositions] + tile;
        const bf16* ahead = values[start / kPositions + kPiecesAhead] + fetched;
        for (int i = start; i < std::min(start + kPositions, positions); i += 2, v += 2 * kTile) {
            for (int line = 0; line < lines; line++, ahead += kTile) prefetch_line(ahead);
            U32x16 v0 = load_u32(v), v1 = load_u32(v + kTile);
            if (i + 1 == positions) v0 = v0 & first_of_two, v1 = v1 & first_of_two;
#pragma GCC unroll 12
            for (int row = 0; row < rows; row++) {
                uint32_t two;
                memcpy(&two, weights + row * w_stride + i, 4);
                auto both = broadcast_u32(two);
                sum[row][0] = fmadd_pairs(both, v0, sum[row][0]);
                sum[row][1] = fmadd_pairs(both, v1, sum[row][1]);
            }
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) {
        store(y + row * y_stride, sum[row][0]);
        store(y + row * y_stride + 16, sum[row][1]);
    }
}

// The same two by AMX, where a row's sums don't depend on the other rows either. Scores (rows, 16 · count), with count
// rounded up to an even number.
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
                block.add(q + (size_t)start * dim + d, dim, keys[i] + d * kPositions, keys[i + 1] + d * kPositions,
                          2 * kPositions);
            }
            block.store(y + start * y_stride + i * kPositions, y_stride);
        }
    }
}

// Dimensions [from, to) of y (rows, dim) of weights (rows, positions), which are 0 behind a row's own.
inline void mix_amx(const bf16* weights, size_t w_stride, int rows, int positions, const bf16* const* values, int from,
                    int to, float* y, int dim) {
    const int whole = positions / kPositions, rest = positions % kPositions;
    for (int d = from; d < to; d += kTile) {
        const size_t tile = (size_t)d * kPositions;
        alignas(64) bf16 last[kPositions * kTile] = {};  // with zeros for what lies behind the last position
        for (int i = 0; i < (rest + 1) / 2 * 2 * kTile; i++)
            last[i] = i / (2 * kTile) * 2 + i % 2 < rest ? values[whole][tile + i] : (bf16)0;
        for (int start = 0; start < rows; start += 2 * kAmxRows) {
            AmxBlock block(std::min(rows - start, 2 * kAmxRows), kPositions / 2);
            block.zero();
            for (int i = 0; i < whole + (rest > 0); i++) {
                const bf16* v = i < whole ? values[i] + tile : last;
                for (int line = 0; line < kPositions * kTile; line += 32)
                    prefetch_line(values[i + kPiecesAhead] + tile + line);
                block.add(weights + start * w_stride + i * kPositions, w_stride, v, v + kTile, 2 * kTile);
            }
            block.store(y + (size_t)start * dim + d, dim);
        }
    }
}

// Calls kernel<rows>(first row) until all rows have had it.
template <class Kernel>
inline void by_blocks(int rows, Kernel kernel) {
    constexpr int kBlock = simd::kSums / 2;
    const int blocks = (rows + kBlock - 1) / kBlock;
    for (int block = 0, row = 0; block < blocks; block++) {
        const int now = (rows - row + blocks - block - 1) / (blocks - block);
        [&]<int... counts>(std::integer_sequence<int, counts...>) {
            (void)((now == counts + 1 && (kernel.template operator()<counts + 1>(row), true)) || ...);
        }(std::make_integer_sequence<int, kBlock>{});
        row += now;
    }
}

// Rows of queries, `group` a token, of one kv head, whose first token is at `position`; each token sees the positions
// up to its own.
struct Attention {
    const CacheView& cache;
    const int32_t* blocks;
    int kv_head, rows, group, position;

    int length() const { return position + (rows - 1) / group + 1; }
    int count() const { return (length() + kPositions - 1) / kPositions; }  // of 16 positions each
    int width() const { return (count() + 1) / 2 * 2 * kPositions; }        // of a row's scores
    bool by_amx() const { return cache.head_dim % (2 * kAmxPairs) == 0 && has_amx(); }

    // Where keys lie, then values, and keys again: an odd piece of keys is multiplied with what follows, whose scores
    // nobody reads.
    const bf16* const* pieces(const NextKeys& next, AttentionScratch& scratch) const {
        const int count = this->count();
        const bf16** found = room(scratch.pieces, 2 * count + kPiecesAhead + 1);
        for (int i = 0; i < count; i++) {
            const size_t at = cache.offset(blocks, i, kv_head);
            found[i] = cache.k + at, found[count + i] = cache.v + at;
        }
        for (int i = 0; i <= kPiecesAhead; i++)
            found[2 * count + i] = cache.k + cache.offset(next.blocks, std::min(i, next.count - 1), next.kv_head);
        return found;
    }

    // Of q (rows, head_dim) the scores (rows, width) of [first, last) of the pieces of keys; `first` is even.
    void score(const bf16* q, const bf16* const* pieces, int first, int last, float* scores) const {
        const int dim = cache.head_dim, width = this->width();
        if (by_amx()) return score_amx(q, rows, dim, pieces + first, last - first, scores + first * kPositions, width);
        for (int i = first; i < last; i += 2)
            by_blocks(rows, [&]<int now>(int row) {
                score_block<now>(q + (size_t)row * dim, dim, dim / 2, pieces + i, pieces + i + kPiecesAhead,
                                 scores + (size_t)row * width + i * kPositions, width);
            });
    }

    // out (rows, head_dim) of its dimensions [from, to), of all scores.
    void mix(const float* scores, const bf16* const* pieces, int from, int to, float* out,
             AttentionScratch& scratch) const {
        const int dim = cache.head_dim, width = this->width();
        const bf16* const* values = pieces + count();
        bf16* weights = room(scratch.weights, (size_t)rows * width);
        float* total = room(scratch.total, rows);
        for (int row = 0; row < rows; row++) {
            const int seen = position + row / group + 1;
            bf16* own = weights + (size_t)row * width;
            total[row] = exponentials(scores + (size_t)row * width, seen, 1.0f / std::sqrt((float)dim),
                                      [=](int i, F32x16 x) { store_bf16(own + i, x); });
            for (int i = (seen + 15) / 16 * 16; i < width; i += 16) store_bf16(own + i, F32x16{});
        }
        // All rows at once. Weights are 0 behind a row's own position, but 0 times an infinite value is NaN: if a later
        // token's value may be infinite, each token's rows are then mixed by themselves.
        for (int first = 0, last = rows, positions = length(); first < rows;) {
            const bf16* some = weights + (size_t)first * width;
            float* mixed = out + (size_t)first * dim;
            if (by_amx()) mix_amx(some, width, last - first, positions, values, from, to, mixed, dim);
            for (int d = from; !by_amx() && d < to; d += kTile)
                by_blocks(last - first, [&]<int now>(int row) {
                    mix_block<now>(some + (size_t)row * width, width, positions, values, (size_t)d * kPositions,
                                   (size_t)from * kPositions, d == from && row == 0 ? (to - from) / 16 : 0,
                                   mixed + (size_t)row * dim + d, dim);
                });
            for (int row = first; row < last; row++) {
                const F32x16 by = broadcast(1.0f / total[row]);
                for (int d = from; d < to; d += 16) store(out + row * dim + d, load(out + row * dim + d) * by);
            }
            const bool is_whole = last - first == rows;
            // The first row has read every value, so it is NaN wherever one is infinite.
            if (is_whole && (rows <= group || is_finite(out, from, to))) return;
            first = is_whole ? 0 : last, last = first + group, positions = position + first / group + 1;
        }
    }

  private:
    static bool is_finite(const float* x, int from, int to) {
        F32x16 sum{};
        for (int i = from; i < to; i += 16) sum = fmadd(load(x + i), F32x16{}, sum);
        return reduce_add(sum) == 0;
    }
};

// out, like q, of the rows of `of`.
inline void attend(const Attention& of, const bf16* q, const NextKeys& next, float* out, AttentionScratch& scratch) {
    const bf16* const* pieces = of.pieces(next, scratch);
    float* scores = room(scratch.scores, (size_t)of.rows * of.width());
    of.score(q, pieces, 0, of.count(), scores);
    of.mix(scores, pieces, 0, of.cache.head_dim, out, scratch);
}
