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

#include "blocks/amx.h"
#include "blocks/wide.h"
#include "numbers.h"
#include "prefetch.h"
#include "stored/products.h"

constexpr int kBlock = simd::kSums >= 24 ? simd::kSums / 2 : simd::kSums;  // rows of a register block

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

// Numbers that begin at a line of cache: registers that cross none are loaded and stored in half the time.
template <class T>
struct LineAllocator {
    using value_type = T;
    LineAllocator() = default;
    template <class Other>
    LineAllocator(const LineAllocator<Other>&) {}
    T* allocate(size_t count) { return (T*)::operator new(count * sizeof(T), kLine); }
    void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
    bool operator==(const LineAllocator&) const = default;

  private:
    static constexpr std::align_val_t kLine{64};
};
template <class T>
using Aligned = std::vector<T, LineAllocator<T>>;

// Room in v for `count` numbers at least, which may be anything.
template <class T, class Allocator>
T* room(std::vector<T, Allocator>& v, size_t count) {
    if (v.size() < count) v.resize(count);
    return v.data();
}

template <bool add, class Prefetched, int rows>
inline void multiply_block(const bf16* x, size_t x_stride, const bf16* w, int pairs, float* y, size_t y_stride,
                           Prefetched& lines) {
    constexpr int kHalves = 2 * rows <= simd::kSums ? 2 : 1;  // of the tile that are multiplied at once
    Prefetched left = lines;
    for (int first = 0; first < kTile; first += 16 * kHalves) {
        F32x16 sum[rows][kHalves];
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
            for (int i = 0; i < kHalves; i++) sum[row][i] = add ? load(y + row * y_stride + first + 16 * i) : F32x16{};
        const bf16* of = w + 2 * first;
        for (int pair = 0; pair < pairs; pair++, of += 2 * kTile) {
            left.prefetch_some();
            U32x16 part[kHalves];
#pragma GCC unroll 2
            for (int i = 0; i < kHalves; i++) part[i] = load_pairs(of + i * kTile);
#pragma GCC unroll 12
            for (int row = 0; row < rows; row++) {
                uint32_t two;
                memcpy(&two, x + row * x_stride + 2 * pair, 4);
                auto both = broadcast_u32(two);
#pragma GCC unroll 2
                for (int i = 0; i < kHalves; i++) sum[row][i] = fmadd_pairs(both, part[i], sum[row][i]);
            }
        }
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
            for (int i = 0; i < kHalves; i++) store(y + row * y_stride + first + 16 * i, sum[row][i]);
    }
    lines = left;
}

// y (rows, 32) = x (rows, 2 · pairs) times one tile, or that added to it.
template <bool add = false, class Prefetched>
inline void multiply(const bf16* x, size_t x_stride, int rows, const bf16* w, int pairs, float* y, size_t y_stride,
                     Prefetched lines) {
    static constexpr auto kByRows = []<int... rows>(std::integer_sequence<int, rows...>) {
        return std::array{multiply_block<add, Prefetched, rows + 1>...};
    }(std::make_integer_sequence<int, kBlock>{});
    if (pairs % kAmxPairs == 0 && has_amx()) {  // by the shape of w alone, so that a row always gets the same bits
        for (int start = 0; start < rows; start += 2 * kAmxRows)
            multiply_amx_block<add>(x + start * x_stride, x_stride, std::min(rows - start, 2 * kAmxRows), w, pairs,
                                    y + start * y_stride, y_stride, lines);
        return;
    }
    while (rows > 0) {
        int blocks = (rows + kBlock - 1) / kBlock, now = (rows + blocks - 1) / blocks;
        kByRows[now - 1](x, x_stride, w, pairs, y, y_stride, lines);
        x += now * x_stride;
        y += now * y_stride;
        rows -= now;
    }
}

// The same of a tile that lies in a cache.
template <bool add = false>
inline void multiply(const bf16* x, size_t x_stride, int rows, const bf16* w, int pairs, float* y, size_t y_stride) {
    multiply<add>(x, x_stride, rows, w, pairs, y, y_stride, NoLines());
}

// The same of rows that may be widened.
template <bool add = false, class Prefetched = NoLines>
inline void multiply(const Rows& x, int rows, const bf16* w, int pairs, float* y, size_t y_stride,
                     Prefetched lines = {}) {
    if constexpr (kWideBlock > 0)
        if (x.wide != nullptr) return multiply_wide<add>(x.wide, x.stride, rows, w, pairs, y, y_stride, lines);
    multiply<add>(x.x, x.stride, rows, w, pairs, y, y_stride, lines);
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
        type_ = type, in_ = in, num_tiles_ = out / kTile;
        tile_size_ = type == kQ4_1   ? in / kTile * sizeof(TileQ4_1)
                     : type == kQ8_0 ? in / kTile * sizeof(TileQ8_0)
                                     : in * kTile * sizeof(bf16);
        data_ = allocate(num_tiles_ * tile_size_ / sizeof(bf16));
    }
    int in() const { return in_; }
    int num_tiles() const { return num_tiles_; }

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

    // y (rows, 32) = x (rows, in) times one tile. Meanwhile the next tile is prefetched, and what `prefetch` holds,
    // which is empty then.
    void multiply(const Rows& x, int rows, int index, float* y, size_t y_stride, ExpandedTile& scratch,
                  PrefetchList& prefetch) const {
        if (type_ != kBf16 && rows <= kStoredRows && !has_amx()) {
            const int count = in_ / kTile;
            if (type_ == kQ4_1)
                multiply_stored(x.x, x.stride, rows, (TileQ4_1*)at(index), count, y, y_stride, prefetch);
            else
                multiply_stored(x.x, x.stride, rows, (TileQ8_0*)at(index), count, y, y_stride, prefetch);
        } else {
            const bf16* w = tile(index, scratch);
            prefetch.add(type_ == kBf16 ? at(index) + kBytesAhead : at(index + 1), tile_size_);
            const int pairs = in_ / 2, at_once = has_amx() ? 2 * kAmxRows : x.wide != nullptr ? kWideBlock : kBlock;
            const bool is_first_read = type_ == kBf16;  // of the tile: its lines are needed as fast as it is multiplied
            if (is_first_read || (int)prefetch.size() > pairs * ((rows + at_once - 1) / at_once))
                ::multiply(x, rows, w, pairs, y, y_stride, prefetch.lines<2>());
            else
                ::multiply(x, rows, w, pairs, y, y_stride, prefetch.lines<1>());
        }
        prefetch.clear();
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
            prefetch_ahead(from + i);
            expand(from[i], scratch.values.get() + i * kTile * kTile);
        }
        scratch.of = from;
        return scratch.values.get();
    }

    WeightType type_ = kBf16;
    int in_ = 0, num_tiles_ = 0;
    size_t tile_size_ = 0;
    Buffer data_;
};
