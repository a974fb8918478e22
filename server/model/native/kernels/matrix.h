// The matrices of a base, packed, and their products, accumulated in fp32.
//
// W (out, in) is packed as [out / 32][in / 2][32][2], so that one register holds two inputs of 16 outputs, which is
// what vdpbf16ps multiplies, and AMX, where there is that. A row's result doesn't depend on how many rows are computed
// with it: each output is one sum over the inputs in one order.
//
// A matrix that is stored in 4 or 8 bits a weight is packed as it is stored, and a tile of it is expanded to the very
// 16-bit weights when it is multiplied: fewer bytes are read, and the same bits come out.
#pragma once
#include <sys/mman.h>
#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "amx.h"
#include "numbers.h"

constexpr int kBlock = 12;              // rows of a register block: 24 accumulators
constexpr int kAhead = 16 * 2 * kTile;  // numbers of a tile by which it is fetched in advance

struct Free {
    void operator()(void* p) const { free(p); }
};
using Buffer = std::unique_ptr<bf16[], Free>;

inline Buffer allocate(size_t count) {
    const size_t huge = 2 << 20, bytes = (count * sizeof(bf16) + huge - 1) / huge * huge;
    void* p = aligned_alloc(huge, bytes);
    if (p == nullptr) throw std::bad_alloc();
    madvise(p, bytes, MADV_HUGEPAGE);
    return Buffer((bf16*)p);
}

// Room in v for `count` numbers at least, which may be anything.
template <class T>
T* room(std::vector<T>& v, size_t count) {
    if (v.size() < count) v.resize(count);
    return v.data();
}

template <bool add, int rows>
inline void multiply_block(const bf16* x, size_t x_stride, const bf16* w, int pairs, float* y, size_t y_stride) {
    __m512 sum[rows][2];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) {
        sum[row][0] = add ? _mm512_loadu_ps(y + row * y_stride) : _mm512_setzero_ps();
        sum[row][1] = add ? _mm512_loadu_ps(y + row * y_stride + 16) : _mm512_setzero_ps();
    }
    for (int pair = 0; pair < pairs; pair++) {
        _mm_prefetch((const char*)(w + kAhead), _MM_HINT_T0);
        _mm_prefetch((const char*)(w + kAhead + kTile), _MM_HINT_T0);
        __m512bh w0 = load_pairs(w), w1 = load_pairs(w + kTile);
        w += 2 * kTile;
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            uint32_t two;
            memcpy(&two, x + row * x_stride + 2 * pair, 4);
            auto both = (__m512bh)_mm512_set1_epi32((int)two);
            sum[row][0] = _mm512_dpbf16_ps(sum[row][0], both, w0);
            sum[row][1] = _mm512_dpbf16_ps(sum[row][1], both, w1);
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) {
        _mm512_storeu_ps(y + row * y_stride, sum[row][0]);
        _mm512_storeu_ps(y + row * y_stride + 16, sum[row][1]);
    }
}

// y (rows, 32) = x (rows, 2 · pairs) times one tile, or that added to it.
template <bool add = false>
inline void multiply(const bf16* x, size_t x_stride, int rows, const bf16* w, int pairs, float* y, size_t y_stride) {
    static constexpr auto kByRows = []<int... rows>(std::integer_sequence<int, rows...>) {
        return std::array{multiply_block<add, rows + 1>...};
    }(std::make_integer_sequence<int, kBlock>{});
    if (pairs % kAmxPairs == 0 && has_amx()) {  // by the shape of w alone, so that a row always gets the same bits
        for (int start = 0; start < rows; start += 2 * kAmxRows)
            multiply_amx_block<add>(x + start * x_stride, x_stride, std::min(rows - start, 2 * kAmxRows), w, pairs,
                                    y + start * y_stride, y_stride);
        return;
    }
    while (rows > 0) {
        int blocks = (rows + kBlock - 1) / kBlock, now = (rows + blocks - 1) / blocks;
        kByRows[now - 1](x, x_stride, w, pairs, y, y_stride);
        x += now * x_stride;
        y += now * y_stride;
        rows -= now;
    }
}

constexpr int kBytesAhead = 2048;  // by which blocks are fetched in advance

// GGUF's blocks, of kTile inputs of one output each, in little-endian order.
struct BlockQ4_1 {  // input i is scale · code + least; codes i and i + 16 share a byte, whose low half is i's
    uint16_t scale, least;
    uint8_t codes[kTile / 2];
};
struct BlockQ8_0 {  // input i is scale · codes[i]
    uint16_t scale;
    int8_t codes[kTile];
};

// The same blocks of a tile's 32 outputs: what expands to [16 pairs][32 outputs][2].
struct TileQ4_1 {
    uint16_t scales[kTile], least[kTile];
    uint32_t codes[2][2 * kTile];  // of eight pairs, four bits each: of an output's first input and its second
};
struct TileQ8_0 {
    uint16_t scales[kTile];
    int8_t codes[kTile / 2][2 * kTile];
};
static_assert(sizeof(BlockQ4_1) * kTile == sizeof(TileQ4_1) && sizeof(BlockQ8_0) * kTile == sizeof(TileQ8_0));

// fp16 numbers of 32 outputs, each twice as a tile's rows have them: eight outputs a register.
inline void load_twice(const uint16_t* p, __m512* to) {
    const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int half = 0; half < 2; half++) {
        const __m512 x = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + 16 * half)));
        to[2 * half] = _mm512_permutexvar_ps(low, x);
        to[2 * half + 1] = _mm512_permutexvar_ps(high, x);
    }
}

inline void store_pairs(bf16* to, __m512 low, __m512 high) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// `to`: 16 pairs. Products of a scale and a code are exact in fp32, so that a sum is rounded once, and then to bf16.
inline void expand(const TileQ4_1& from, bf16* to) {
    const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 scales[4], least[4];
    load_twice(from.scales, scales);
    load_twice(from.least, least);
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 4; i += 2) {
            __m512i a = _mm512_loadu_si512(from.codes[half] + 16 * i);
            __m512i b = _mm512_loadu_si512(from.codes[half] + 16 * i + 16);
#pragma GCC unroll 8
            for (int pair = 0; pair < 8; pair++) {  // a permutation looks at the lowest four bits alone
                store_pairs(to + (8 * half + pair) * 2 * kTile + 16 * i,
                            _mm512_fmadd_ps(_mm512_permutexvar_ps(a, numbers), scales[i], least[i]),
                            _mm512_fmadd_ps(_mm512_permutexvar_ps(b, numbers), scales[i + 1], least[i + 1]));
                a = _mm512_srli_epi32(a, 4), b = _mm512_srli_epi32(b, 4);
            }
        }
}
inline void expand(const TileQ8_0& from, bf16* to) {
    __m512 scales[4];
    load_twice(from.scales, scales);
    for (int pair = 0; pair < kTile / 2; pair++) {
        auto load = [&](int i) {
            const __m128i codes = _mm_loadu_si128((const __m128i*)(from.codes[pair] + 16 * i));
            return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)), scales[i]);
        };
        for (int i = 0; i < 4; i += 2) store_pairs(to + pair * 2 * kTile + 16 * i, load(i), load(i + 1));
    }
}

// The blocks of 32 outputs, `stride` apart.
inline void pack(const BlockQ4_1* from, size_t stride, TileQ4_1& to) {
    for (int row = 0; row < kTile; row++) {
        const BlockQ4_1& block = from[row * stride];
        to.scales[row] = block.scale, to.least[row] = block.least;
        for (int i = 0; i < 2; i++) {
            uint32_t low = 0, high = 0;
            for (int pair = 0; pair < 8; pair++) {
                low |= (uint32_t)(block.codes[2 * pair + i] & 15) << 4 * pair;
                high |= (uint32_t)(block.codes[2 * pair + i] >> 4) << 4 * pair;
            }
            to.codes[0][2 * row + i] = low, to.codes[1][2 * row + i] = high;
        }
    }
}
inline void pack(const BlockQ8_0* from, size_t stride, TileQ8_0& to) {
    for (int row = 0; row < kTile; row++) {
        const BlockQ8_0& block = from[row * stride];
        to.scales[row] = block.scale;
        for (int i = 0; i < kTile; i++) to.codes[i / 2][2 * row + i % 2] = block.codes[i];
    }
}

// A tile that was expanded, for the next block of rows too.
struct ExpandedTile {
    const void* of = nullptr;
    size_t size = 0;
    Buffer values;
};

// One matrix of a base, packed.
class Matrix {
  public:
    void reserve(WeightType type, int out, int in) {
        type_ = type, in_ = in;
        tile_size_ = type == kQ4_1   ? in / kTile * sizeof(TileQ4_1)
                     : type == kQ8_0 ? in / kTile * sizeof(TileQ8_0)
                                     : in * kTile * sizeof(bf16);
        data_ = allocate(out / kTile * tile_size_ / sizeof(bf16));
    }
    int in() const { return in_; }

    // Packs one tile of w (out, in).
    void pack(const BaseTensor& w, int index) {
        switch (type_) {
            case kBf16: return pack_values(w.values, index);
            case kQ4_1: return pack_blocks<BlockQ4_1, TileQ4_1>(w.blocks, index);
            case kQ8_0: return pack_blocks<BlockQ8_0, TileQ8_0>(w.blocks, index);
        }
    }

    // One tile as `multiply` takes it, [in / 2][32][2]; it may lie in `scratch`.
    const bf16* tile(int index, ExpandedTile& scratch) const {
        switch (type_) {
            case kQ4_1: return expanded<TileQ4_1>(index, scratch);
            case kQ8_0: return expanded<TileQ8_0>(index, scratch);
            default: return (const bf16*)at(index);
        }
    }

    // y (rows, 32) = x (rows, in) times one tile.
    void multiply(const bf16* x, size_t x_stride, int rows, int index, float* y, size_t y_stride,
                  ExpandedTile& scratch) const {
        ::multiply(x, x_stride, rows, tile(index, scratch), in_ / 2, y, y_stride);
    }

  private:
    char* at(int index) const { return (char*)data_.get() + index * tile_size_; }

    void pack_values(const bf16* w, int index) {
        const int pairs = in_ / 2;
        auto* to = (uint32_t*)at(index);
        for (int row = 0; row < kTile; row++) {
            auto* from = (const uint32_t*)(w + (size_t)(index * kTile + row) * in_);
            for (int pair = 0; pair < pairs; pair++) to[pair * kTile + row] = from[pair];
        }
    }

    template <class Block, class Tile>
    void pack_blocks(const uint8_t* blocks, int index) {
        const int count = in_ / kTile;
        for (int i = 0; i < count; i++)
            ::pack((const Block*)blocks + (size_t)index * kTile * count + i, count, ((Tile*)at(index))[i]);
    }

    template <class Tile>
    const bf16* expanded(int index, ExpandedTile& scratch) const {
        const size_t size = (size_t)in_ * kTile;
        const auto* from = (const Tile*)at(index);
        if (scratch.of == from) return scratch.values.get();
        if (scratch.size < size) scratch.values = allocate(size), scratch.size = size;
        for (int i = 0; i < in_ / kTile; i++) {
            for (size_t line = 0; line < sizeof(Tile); line += 64)
                _mm_prefetch((const char*)(from + i) + kBytesAhead + line, _MM_HINT_T0);
            expand(from[i], scratch.values.get() + i * kTile * kTile);
        }
        scratch.of = from;
        return scratch.values.get();
    }

    WeightType type_ = kBf16;
    int in_ = 0;
    size_t tile_size_ = 0;
    Buffer data_;
};
