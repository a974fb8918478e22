// The products of adapters when serving. Adapters have few rows, so the kernels differ from those of matrix.h.
//
// A (rows, in) is packed as (in / 2, rows, 2): a register holds a pair of inputs for 16 rows. A block has up to three
// such vectors (rank 48) and as many tokens as registers allow. A tile of 32 outputs of B is packed as (rank / 2, 32,
// 2). Each result is one sum in a fixed order, which doesn't depend on the other tokens and rows.
#pragma once
#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <utility>

#include "../blocks/amx.h"
#include "../matrix.h"
#include "../numbers.h"

constexpr int kShrinkTokens = 16;  // tokens in a task of products with A, at most
constexpr int kShrinkVectors = 3;  // vectors of 16 rows of A in such a task, at most
constexpr int kOwnTokens = 4;      // tokens with an A each that are computed together, at most

// y (tokens, 48) = x (tokens, 2 · pairs) times `columns` rows of A, packed as (pairs, rows, 2).
template <int vectors, int tokens>
inline void multiply_rows(const bf16* x, size_t x_stride, const bf16* a, size_t rows, int columns, int pairs,
                          float* y) {
    F32x16 sum[tokens][vectors];
    for (auto& token_sums : sum)
        for (auto& vector : token_sums) vector = F32x16{};
    const Mask16 last = first_lanes(columns - 16 * (vectors - 1));
    for (int pair = 0; pair < pairs; pair++, a += 2 * rows) {
        U32x16 w[vectors];
#pragma GCC unroll 3
        for (int i = 0; i < vectors; i++) w[i] = load_lanes(i == vectors - 1 ? last : 0xffff, a + 32 * i);
#pragma GCC unroll 16
        for (int token = 0; token < tokens; token++) {
            const U32x16 x_pair = broadcast_pair(x + token * x_stride + 2 * pair);
#pragma GCC unroll 3
            for (int i = 0; i < vectors; i++) sum[token][i] = fmadd_pairs(x_pair, w[i], sum[token][i]);
        }
    }
#pragma GCC unroll 16
    for (int token = 0; token < tokens; token++)
#pragma GCC unroll 3
        for (int i = 0; i < vectors; i++) store(y + (token * kShrinkVectors + i) * 16, sum[token][i]);
}

// The same for `tokens` tokens, each with its own x and A. Their independent sums hide the latency of additions.
template <int vectors, int tokens>
inline void multiply_own_rows(const bf16* const* x, const bf16* const* a, size_t rows, int columns, int pairs,
                              float* y) {
    F32x16 sum[tokens][vectors];
    for (auto& token_sums : sum)
        for (auto& vector : token_sums) vector = F32x16{};
    const Mask16 last = first_lanes(columns - 16 * (vectors - 1));
    for (int pair = 0; pair < pairs; pair++)
#pragma GCC unroll 4
        for (int token = 0; token < tokens; token++) {
            const U32x16 x_pair = broadcast_pair(x[token] + 2 * pair);
#pragma GCC unroll 3
            for (int i = 0; i < vectors; i++) {
                const void* w = a[token] + 2 * rows * pair + 32 * i;
                sum[token][i] = fmadd_pairs(x_pair, load_lanes(i == vectors - 1 ? last : 0xffff, w), sum[token][i]);
            }
        }
#pragma GCC unroll 4
    for (int token = 0; token < tokens; token++)
#pragma GCC unroll 3
        for (int i = 0; i < vectors; i++) store(y + (token * kShrinkVectors + i) * 16, sum[token][i]);
}

// The same for two to kOwnTokens tokens.
inline void multiply_own_rows(const bf16* const* x, const bf16* const* a, int tokens, size_t rows, int columns,
                              int pairs, float* y) {
    static constexpr auto kByShape = []<int... i>(std::integer_sequence<int, i...>) {
        return std::array{multiply_own_rows<i / (kOwnTokens - 1) + 1, i % (kOwnTokens - 1) + 2>...};
    }(std::make_integer_sequence<int, kShrinkVectors*(kOwnTokens - 1)>{});
    kByShape[((columns + 15) / 16 - 1) * (kOwnTokens - 1) + tokens - 2](x, a, rows, columns, pairs, y);
}

// `multiply_rows` for any number of tokens, in blocks that fit into registers.
template <int vectors>
inline void multiply_rows(const bf16* x, size_t x_stride, int tokens, const bf16* a, size_t rows, int columns,
                          int pairs, float* y) {
    constexpr int kAtOnce = std::clamp(simd::kSums / vectors, 1, vectors == 1 ? 16 : 8);
    static constexpr auto kByTokens = []<int... i>(std::integer_sequence<int, i...>) {
        return std::array{multiply_rows<vectors, i + 1>...};
    }(std::make_integer_sequence<int, kAtOnce>{});
    for (int token = 0; token < tokens; token += kAtOnce)
        kByTokens[std::min(tokens - token, kAtOnce) - 1](x + token * x_stride, x_stride, a, rows, columns, pairs,
                                                         y + token * kShrinkVectors * 16);
}

// The same by AMX, for up to 16 tokens; pairs is a multiple of 16.
inline void multiply_rows_amx(const bf16* x, size_t x_stride, int tokens, const bf16* a, size_t rows, int columns,
                              int pairs, float* y) {
    const int vectors = (columns + 15) / 16;
    AmxShape shape;  // tile registers 0 to 2 hold the sums, 3 holds x, 4 to 6 hold A
    for (int i = 0; i < kShrinkVectors; i++) {
        const int count = std::clamp(columns - 16 * i, 1, 16);
        shape.rows[i] = static_cast<uint8_t>(tokens);
        shape.rows[4 + i] = kAmxPairs;
        shape.bytes_of_row[i] = shape.bytes_of_row[4 + i] = static_cast<uint16_t>(count * sizeof(float));
    }
    shape.rows[3] = static_cast<uint8_t>(tokens);
    shape.bytes_of_row[3] = 64;
    asm volatile("" ::: "memory");
    _tile_loadconfig(&shape);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    for (int pair = 0; pair < pairs; pair += kAmxPairs, a += kAmxPairs * 2 * rows) {
        _tile_loadd(3, x + 2 * pair, x_stride * sizeof(bf16));
        _tile_loadd(4, a, 2 * rows * sizeof(bf16));
        _tile_dpbf16ps(0, 3, 4);
        if (vectors == 1) continue;
        _tile_loadd(5, a + 32, 2 * rows * sizeof(bf16));
        _tile_dpbf16ps(1, 3, 5);
        if (vectors == 2) continue;
        _tile_loadd(6, a + 64, 2 * rows * sizeof(bf16));
        _tile_dpbf16ps(2, 3, 6);
    }
    constexpr int kStride = kShrinkVectors * 16 * sizeof(float);
    _tile_stored(0, y, kStride);
    if (vectors > 1) _tile_stored(1, y + 16, kStride);
    if (vectors > 2) _tile_stored(2, y + 32, kStride);
    _tile_release();
    asm volatile("" ::: "memory");
}

// While it lives, denormal numbers are 0, as in AMX.
class FlushesToZero {
  public:
    FlushesToZero() : before_(simd::float_mode()) { simd::set_float_mode(before_ | simd::kFlushesToZero); }
    ~FlushesToZero() { simd::set_float_mode(before_); }
    FlushesToZero(const FlushesToZero&) = delete;
    FlushesToZero& operator=(const FlushesToZero&) = delete;

  private:
    const decltype(simd::float_mode()) before_;
};

// y (32) += hidden (2 · pairs) times a tile of B, with AMX's bits: for 16 pairs it sums the even and the odd inputs
// separately, adds both sums, and adds that to y. For a few tokens this is faster than AMX.
inline void expand_as_amx(const bf16* hidden, const bf16* b, int pairs, float* y) {
    const U32x16 high = broadcast_u32(0xffff0000);
    F32x16 y0 = load(y), y1 = load(y + 16);
    for (int first = 0; first < pairs; first += kAmxPairs) {
        F32x16 even0{}, odd0{}, even1{}, odd1{};
        for (int pair = first; pair < std::min(pairs, first + kAmxPairs); pair++) {
            const uint32_t hidden_pair = load_pair(hidden + 2 * pair);
            const F32x16 even = as_f32(broadcast_u32(hidden_pair << 16));
            const F32x16 odd = as_f32(broadcast_u32(hidden_pair & 0xffff0000));
            const bf16* next = b + (pairs + pair) * 2 * kTile;  // this thread's next item will read it
            prefetch_line(next);
            prefetch_line(next + kTile);
            const U32x16 w0 = load_pairs(b + pair * 2 * kTile);
            const U32x16 w1 = load_pairs(b + pair * 2 * kTile + kTile);
            even0 = fmadd(even, as_f32(w0 << 16), even0);
            odd0 = fmadd(odd, as_f32(w0 & high), odd0);
            even1 = fmadd(even, as_f32(w1 << 16), even1);
            odd1 = fmadd(odd, as_f32(w1 & high), odd1);
        }
        y0 = y0 + (even0 + odd0);
        y1 = y1 + (even1 + odd1);
    }
    store(y, y0);
    store(y + 16, y1);
}
