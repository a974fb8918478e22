// Attention of a step's tokens over a paged cache of keys and values; queries are grouped by kv head.
//
// A run of few new tokens walks the cache as it lies. For more of them keys and values are packed once, like
// weights, and products of matrices take over.
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
    std::vector<size_t> offsets;  // of each position
};

struct CacheView {  // one layer's, (num_blocks, block_size, kv_heads, head_dim)
    bf16 *k, *v;
    int block_size, kv_heads, head_dim;
    size_t offset(const int32_t* blocks, int position, int kv_head) const {
        size_t slot = (size_t)blocks[position / block_size] * block_size + position % block_size;
        return (slot * kv_heads + kv_head) * head_dim;
    }
};

// The sums of sixteen registers, in order.
inline __m512 sums16(const __m512* v) {
    __m512 two[8], four[4];
    for (int i = 0; i < 8; i++)
        two[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    __m512 a =
        _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x44), _mm512_shuffle_f32x4(four[0], four[1], 0xee));
    __m512 b =
        _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x44), _mm512_shuffle_f32x4(four[2], four[3], 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// Turns the first `count` scores into e^(scale · (score - max)) and the rest, up to a multiple of 16, into zeros;
// returns their sum.
inline float exponentials(float* scores, int count, float scale) {
    const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __m512 top = none;
    for (int i = 0; i < count; i += 16)
        top = _mm512_max_ps(top, _mm512_mask_loadu_ps(none, first_lanes(count - i), scores + i));
    const __m512 shift = _mm512_set1_ps(_mm512_reduce_max_ps(top)), by = _mm512_set1_ps(scale);
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < count; i += 16) {
        __m512 x = exp16(_mm512_mul_ps(by, _mm512_sub_ps(_mm512_loadu_ps(scores + i), shift)));
        x = _mm512_maskz_mov_ps(first_lanes(count - i), x);
        _mm512_storeu_ps(scores + i, x);
        sum = _mm512_add_ps(sum, x);
    }
    return _mm512_reduce_add_ps(sum);
}

// One token's queries of one kv head, q (group, head_dim), over `length` positions; out is like q.
template <int group>
void attend_one(const bf16* q, const CacheView& cache, const int32_t* blocks, int kv_head, int length, bf16* out,
                AttentionScratch& scratch) {
    const int dim = cache.head_dim, stride = (length + 15) / 16 * 16;
    float* scores = room(scratch.scores, (size_t)group * stride);
    size_t* offsets = room(scratch.offsets, stride);
    for (int start = 0; start < length; start += cache.block_size) {
        const size_t first = cache.offset(blocks, start, kv_head), step = (size_t)cache.kv_heads * dim;
        for (int i = start; i < std::min(start + cache.block_size, length); i++)
            offsets[i] = first + (i - start) * step;
    }
    for (int i = length; i < stride; i++) offsets[i] = offsets[length - 1];
    const float scale = 1.0f / std::sqrt((float)dim);
    for (int start = 0; start < length; start += 16) {
        for (int i = start; i < start + 16; i++)
            for (int d = 0; d < dim; d += 32) {
                _mm_prefetch((const char*)(cache.k + offsets[std::min(i + 16, stride - 1)] + d), _MM_HINT_T0);
                _mm_prefetch((const char*)(cache.v + offsets[i] + d), _MM_HINT_T0);
            }
        for (int head = 0; head < group; head++) {
            __m512 sum[16];
            for (int i = 0; i < 16; i++) {
                sum[i] = _mm512_setzero_ps();
                for (int d = 0; d < dim; d += 32)
                    sum[i] = _mm512_dpbf16_ps(sum[i], load_pairs(q + head * dim + d),
                                              load_pairs(cache.k + offsets[start + i] + d));
            }
            _mm512_storeu_ps(scores + head * stride + start, sums16(sum));
        }
    }
    float total[group];
    for (int head = 0; head < group; head++) total[head] = exponentials(scores + head * stride, length, scale);
    for (int d = 0; d < dim; d += 32) {
        __m512 sum[group][2];
        for (int head = 0; head < group; head++) sum[head][0] = sum[head][1] = _mm512_setzero_ps();
        for (int position = 0; position < length; position++) {
            const bf16* v = cache.v + offsets[position] + d;
            __m512 v0 = load_bf16(v), v1 = load_bf16(v + 16);
            for (int head = 0; head < group; head++) {
                __m512 weight = _mm512_set1_ps(scores[head * stride + position]);
                sum[head][0] = _mm512_fmadd_ps(weight, v0, sum[head][0]);
                sum[head][1] = _mm512_fmadd_ps(weight, v1, sum[head][1]);
            }
        }
        for (int head = 0; head < group; head++) {
            __m512 by = _mm512_set1_ps(1.0f / total[head]);
            store_bf16(out + head * dim + d, _mm512_mul_ps(sum[head][0], by));
            store_bf16(out + head * dim + d + 16, _mm512_mul_ps(sum[head][1], by));
        }
    }
}

inline void attend_one(int group, const bf16* q, const CacheView& cache, const int32_t* blocks, int kv_head, int length,
                       bf16* out, AttentionScratch& scratch) {
    static constexpr auto kByGroup = []<int... group>(std::integer_sequence<int, group...>) {
        return std::array{attend_one<group + 1>...};
    }(std::make_integer_sequence<int, kMaxGroup>{});
    kByGroup[group - 1](q, cache, blocks, kv_head, length, out, scratch);
}

// The keys and values of one sequence and kv head, packed as `Matrix` packs weights.
struct PackedCache {
    const int32_t* blocks;
    int kv_head, length;
    bf16 *k, *v;  // k: [positions / 32][head_dim / 2][32][2], v: [head_dim / 32][positions / 2][32][2]
    int tiles() const { return (length + kTile - 1) / kTile; }

    void pack(const CacheView& cache, int tile) const {
        const int dim = cache.head_dim, start = tile * kTile;
        auto* keys = (uint32_t*)k + (size_t)tile * kTile * dim / 2;
        const bf16* rows[kTile];
        for (int i = 0; i < kTile; i++) {
            if (start + i >= length) {
                rows[i] = nullptr;
                for (int pair = 0; pair < dim / 2; pair++) keys[pair * kTile + i] = 0;
                continue;
            }
            size_t offset = cache.offset(blocks, start + i, kv_head);
            auto* from = (const uint32_t*)(cache.k + offset);
            for (int pair = 0; pair < dim / 2; pair++) keys[pair * kTile + i] = from[pair];
            rows[i] = cache.v + offset;
        }
        for (int d = 0; d < dim; d += kTile) {
            bf16* to = v + (size_t)d * tiles() * kTile + (size_t)start * kTile;
            for (int i = 0; i < kTile; i++)
                for (int column = 0; column < kTile; column++)
                    to[(i / 2 * kTile + column) * 2 + i % 2] = rows[i] == nullptr ? 0 : rows[i][d + column];
        }
    }

    // q (rows, head_dim), `group` rows a token, whose first token is at `position`; out is like q.
    void attend(const bf16* q, int rows, int group, int position, int dim, float* out,
                AttentionScratch& scratch) const {
        const int used = (position + (rows - 1) / group + kTile) / kTile;  // tiles that any row sees
        const int width = used * kTile;
        float* scores = room(scratch.scores, (size_t)rows * width);
        bf16* weights = room(scratch.weights, (size_t)rows * width);
        float* total = room(scratch.total, rows);
        for (int tile = 0; tile < used; tile++)
            multiply(q, dim, rows, k + (size_t)tile * kTile * dim, dim / 2, scores + tile * kTile, width);
        for (int row = 0; row < rows; row++) {
            float* own = scores + (size_t)row * width;
            const int seen = position + row / group + 1;
            total[row] = exponentials(own, seen, 1.0f / std::sqrt((float)dim));
            bf16* to = weights + (size_t)row * width;
            for (int i = 0; i < width; i += 16)
                store_bf16(to + i, i < seen ? _mm512_loadu_ps(own + i) : _mm512_setzero_ps());
        }
        for (int d = 0; d < dim; d += kTile)
            multiply(weights, width, rows, v + (size_t)d * tiles() * kTile, width / 2, out + d, dim);
        for (int row = 0; row < rows; row++)
            for (int d = 0; d < dim; d++) out[row * dim + d] /= total[row];
    }
};
