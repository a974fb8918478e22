// A base's packed matrices, and their products y = x Wᵀ with bf16 operands and fp32 sums.
//
// W (out, in) is packed in tiles of 32 outputs, as [out / 32][in / 2][32][2]: one register holds a pair of inputs for
// 16 outputs, the operand of vdpbf16ps and of AMX. A kernel computes y for a block of rows and one tile. The block is
// as large as the registers allow (`kRowBlock`), since each loaded weight is used once for each of its rows. A row's
// result doesn't depend on the other rows: each output is one sum over the inputs, in order.
//
// A matrix with 4 or 8 bits per weight is packed as it is stored. A tile is expanded to its exact bf16 values when it
// is multiplied: fewer bytes are read from memory, and the result has the same bits.
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

// Rows of a register block. With enough registers a block has both halves of a tile, else one half at a time.
constexpr int kRowBlock = simd::kSums >= 24 ? simd::kSums / 2 : simd::kSums;

struct Free {
    void operator()(void* p) const { free(p); }
};
using Buffer = std::unique_ptr<bf16[], Free>;

// Memory for `count` numbers in huge pages. Throws std::bad_alloc.
inline Buffer allocate(size_t count) {
    constexpr size_t kHugePage = 2 << 20;
    const size_t bytes = (count * sizeof(bf16) + kHugePage - 1) / kHugePage * kHugePage;
    void* p = aligned_alloc(kHugePage, bytes);
    if (p == nullptr) throw std::bad_alloc();
    madvise(p, bytes, MADV_HUGEPAGE);
    return Buffer(static_cast<bf16*>(p));
}

// Aligns to cache lines: a register that crosses two lines takes twice as long to load or store.
template <class T>
struct LineAllocator {
    using value_type = T;
    LineAllocator() = default;
    template <class Other>
    LineAllocator(const LineAllocator<Other>&) {}
    T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
    void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
    bool operator==(const LineAllocator&) const = default;

  private:
    static constexpr std::align_val_t kLine{64};
};
template <class T>
using Aligned = std::vector<T, LineAllocator<T>>;

// Returns v's data, with room for at least `count` numbers of any value. v never shrinks.
template <class T, class Allocator>
T* room(std::vector<T, Allocator>& v, size_t count) {
    if (v.size() < count) v.resize(count);
    return v.data();
}

// y (rows, 32) = x (rows, 2 · pairs) times one tile w, or y += that; the rows are a compile-time constant.
template <bool add, class Prefetched, int rows>
inline void multiply_block(const bf16* x, size_t x_stride, const bf16* w, int pairs, float* y, size_t y_stride,
                           Prefetched& lines) {
    constexpr int kHalves = 2 * rows <= simd::kSums ? 2 : 1;  // halves of the tile at once
    Prefetched remaining = lines;                             // a local copy stays in registers
    for (int first = 0; first < kTile; first += 16 * kHalves) {
        F32x16 sum[rows][kHalves];
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
            for (int i = 0; i < kHalves; i++) sum[row][i] = add ? load(y + row * y_stride + first + 16 * i) : F32x16{};
        const bf16* weights = w + 2 * first;
        for (int pair = 0; pair < pairs; pair++, weights += 2 * kTile) {
            remaining.prefetch_some();
            U32x16 w_pairs[kHalves];
#pragma GCC unroll 2
            for (int i = 0; i < kHalves; i++) w_pairs[i] = load_pairs(weights + i * kTile);
#pragma GCC unroll 12
            for (int row = 0; row < rows; row++) {
                const U32x16 x_pair = broadcast_pair(x + row * x_stride + 2 * pair);
#pragma GCC unroll 2
                for (int i = 0; i < kHalves; i++) sum[row][i] = fmadd_pairs(x_pair, w_pairs[i], sum[row][i]);
            }
        }
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
            for (int i = 0; i < kHalves; i++) store(y + row * y_stride + first + 16 * i, sum[row][i]);
    }
    lines = remaining;
}

// y (rows, 32) = x (rows, 2 · pairs) times one tile, or y += that, in register blocks of nearly equal size. `lines` are
// prefetched meanwhile.
template <bool add = false, class Prefetched>
inline void multiply(const bf16* x, size_t x_stride, int rows, const bf16* w, int pairs, float* y, size_t y_stride,
                     Prefetched lines) {
    static constexpr auto kByRows = []<int... rows>(std::integer_sequence<int, rows...>) {
        return std::array{multiply_block<add, Prefetched, rows + 1>...};
    }(std::make_integer_sequence<int, kRowBlock>{});
    if (pairs % kAmxPairs == 0 && has_amx()) {  // depends only on w's shape, so that a row always gets the same bits
        for (int start = 0; start < rows; start += 2 * kAmxRows)
            multiply_amx_block<add>(x + start * x_stride, x_stride, std::min(rows - start, 2 * kAmxRows), w, pairs,
                                    y + start * y_stride, y_stride, lines);
        return;
    }
    while (rows > 0) {
        const int blocks = (rows + kRowBlock - 1) / kRowBlock;
        const int block = (rows + blocks - 1) / blocks;
        kByRows[block - 1](x, x_stride, w, pairs, y, y_stride, lines);
        x += block * x_stride;
        y += block * y_stride;
        rows -= block;
    }
}

// The same without prefetching, for a tile that is in a cache.
template <bool add = false>
inline void multiply(const bf16* x, size_t x_stride, int rows, const bf16* w, int pairs, float* y, size_t y_stride) {
    multiply<add>(x, x_stride, rows, w, pairs, y, y_stride, NoLines());
}

// The same for rows that may have been widened to fp32.
template <bool add = false, class Prefetched = NoLines>
inline void multiply(const Rows& x, int rows, const bf16* w, int pairs, float* y, size_t y_stride,
                     Prefetched lines = {}) {
    if constexpr (kWideBlock > 0)
        if (x.wide != nullptr) return multiply_wide<add>(x.wide, x.stride, rows, w, pairs, y, y_stride, lines);
    multiply<add>(x.x, x.stride, rows, w, pairs, y, y_stride, lines);
}

// The last tile that was expanded; the next rows may need it again.
struct ExpandedTile {
    const void* source = nullptr;
    size_t size = 0;  // of `values`
    Buffer values;
};

// One packed matrix (out, in) of a base.
class Matrix {
  public:
    void reserve(WeightType type, int out, int in) {
        type_ = type;
        in_ = in;
        num_tiles_ = out / kTile;
        tile_size_ = type == kQ4_1   ? in / kTile * sizeof(TileQ4_1)
                     : type == kQ8_0 ? in / kTile * sizeof(TileQ8_0)
                                     : in * kTile * sizeof(bf16);
        data_ = allocate(num_tiles_ * tile_size_ / sizeof(bf16));
    }
    int in() const { return in_; }
    int num_tiles() const { return num_tiles_; }

    // Packs the tile with w's rows [32 · index, 32 · index + 32).
    void pack(const BaseTensor& w, int index) {
        switch (type_) {
            case kBf16: return pack_values(w.values, index);
            case kQ4_1: return pack_blocks<BlockQ4_1, TileQ4_1>(w.blocks, index);
            case kQ8_0: return pack_blocks<BlockQ8_0, TileQ8_0>(w.blocks, index);
        }
    }

    // A tile as `multiply` takes it, [in / 2][32][2]. Stored weights are expanded into `scratch`.
    const bf16* tile(int index, ExpandedTile& scratch) const {
        switch (type_) {
            case kQ4_1: return expanded<TileQ4_1>(index, scratch);
            case kQ8_0: return expanded<TileQ8_0>(index, scratch);
            default: return reinterpret_cast<const bf16*>(tile_data(index));
        }
    }

    // y (rows, 32) = x (rows, in) times one tile. Meanwhile the next tile and the lines of `prefetch` are prefetched;
    // `prefetch` is then cleared.
    void multiply(const Rows& x, int rows, int index, float* y, size_t y_stride, ExpandedTile& scratch,
                  PrefetchList& prefetch) const {
        if (type_ != kBf16 && rows <= kStoredRows && !has_amx()) {
            const int count = in_ / kTile;
            if (type_ == kQ4_1)
                multiply_stored(x.x, x.stride, rows, reinterpret_cast<TileQ4_1*>(tile_data(index)), count, y, y_stride,
                                prefetch);
            else
                multiply_stored(x.x, x.stride, rows, reinterpret_cast<TileQ8_0*>(tile_data(index)), count, y, y_stride,
                                prefetch);
        } else {
            const bf16* w = tile(index, scratch);
            prefetch.add(type_ == kBf16 ? tile_data(index) + kBytesAhead : tile_data(index + 1), tile_size_);
            const int pairs = in_ / 2;
            const int block = has_amx() ? 2 * kAmxRows : x.wide != nullptr ? kWideBlock : kRowBlock;
            const int num_blocks = (rows + block - 1) / block;
            // A tile in bf16 comes from memory while it is multiplied: its lines are needed sooner.
            if (type_ == kBf16 || static_cast<int>(prefetch.size()) > pairs * num_blocks)
                ::multiply(x, rows, w, pairs, y, y_stride, prefetch.lines<2>());
            else
                ::multiply(x, rows, w, pairs, y, y_stride, prefetch.lines<1>());
        }
        prefetch.clear();
    }

  private:
    char* tile_data(int index) const { return reinterpret_cast<char*>(data_.get()) + index * tile_size_; }

    void pack_values(const bf16* w, int index) {
        const int pairs = in_ / 2;
        auto* packed_pairs = reinterpret_cast<uint32_t*>(tile_data(index));
        for (int row = 0; row < kTile; row++) {
            auto* w_pairs = reinterpret_cast<const uint32_t*>(w + static_cast<size_t>(index * kTile + row) * in_);
            for (int pair = 0; pair < pairs; pair++) packed_pairs[pair * kTile + row] = w_pairs[pair];
        }
    }

    template <class Block, class Tile>
    void pack_blocks(const uint8_t* blocks, int index) {
        const int count = in_ / kTile;
        const auto* first = reinterpret_cast<const Block*>(blocks) + static_cast<size_t>(index) * kTile * count;
        auto* tiles = reinterpret_cast<Tile*>(tile_data(index));
        for (int i = 0; i < count; i++) ::pack(first + i, count, tiles[i]);
    }

    template <class Tile>
    const bf16* expanded(int index, ExpandedTile& scratch) const {
        const size_t size = static_cast<size_t>(in_) * kTile;
        const auto* stored = reinterpret_cast<const Tile*>(tile_data(index));
        if (scratch.source == stored) return scratch.values.get();
        if (scratch.size < size) {
            scratch.values = allocate(size);
            scratch.size = size;
        }
        for (int i = 0; i < in_ / kTile; i++) {
            prefetch_ahead(stored + i);
            expand(stored[i], scratch.values.get() + i * kTile * kTile);
        }
        scratch.source = stored;
        return scratch.values.get();
    }

    WeightType type_ = kBf16;
    int in_ = 0, num_tiles_ = 0;
    size_t tile_size_ = 0;
    Buffer data_;
};
