// Products with a packed tile by AMX, the matrix unit of Intel's Xeons since the fourth generation.
//
// An instruction multiplies 16 rows by 16 columns over 32 inputs. A block of 32 rows and 32 columns uses all eight tile
// registers: four of sums, two of x, two of w. AMX adds each output in its own order: for 32 inputs it sums the even
// and the odd ones separately, adds both sums, and adds that to the previous inputs' sum. A row's result doesn't depend
// on the other rows, but its last bits differ from those of vdpbf16ps.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "../numbers.h"
#include "../prefetch.h"

constexpr int kAmxPairs = 16;  // pairs of inputs per instruction, at most
constexpr int kAmxRows = 16;   // rows per instruction, at most

#ifdef __AVX512BF16__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// Whether this processor has AMX and the system permits it. NATIVE_AMX=0 turns it off.
inline bool has_amx() {
    static const bool found = [] {
        constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // in EDX of CPUID's leaf 7
        constexpr long kRequest = 0x1023, kTileData = 18;        // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
        unsigned a, b, c, d;
        const char* wanted = getenv("NATIVE_AMX");
        if (wanted != nullptr && *wanted == '0') return false;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTiles) == 0) return false;
        return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
    }();
    return found;
}
#else
constexpr bool has_amx() { return false; }  // built for an instruction set without AMX
#endif

struct alignas(64) AmxShape {  // in the layout of ldtilecfg
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes_of_row[16] = {};
    uint8_t rows[16] = {};
};

// The sums of up to 32 rows and 32 columns in this thread's tile registers, which the destructor releases. Registers 0
// to 3 hold the sums' quarters, 4 and 5 rows of x, 6 and 7 the halves of w. An instruction takes `pairs` pairs.
//
// The compiler doesn't know that the instructions access memory, so each member has a barrier.
class AmxBlock {
  public:
    explicit AmxBlock(int rows, int pairs = kAmxPairs) : has_lower_(rows > kAmxRows) {
        const int lower = has_lower_ ? rows - kAmxRows : 1;
        AmxShape shape;
        for (int i = 0; i < 8; i++) {
            shape.bytes_of_row[i] = 64;
            shape.rows[i] = kAmxRows;
        }
        shape.rows[0] = shape.rows[1] = shape.rows[4] = static_cast<uint8_t>(std::min(rows, kAmxRows));
        shape.rows[2] = shape.rows[3] = shape.rows[5] = static_cast<uint8_t>(lower);
        shape.bytes_of_row[4] = shape.bytes_of_row[5] = static_cast<uint16_t>(pairs * 2 * sizeof(bf16));
        shape.rows[6] = shape.rows[7] = static_cast<uint8_t>(pairs);
        asm volatile("" ::: "memory");
        _tile_loadconfig(&shape);
    }
    ~AmxBlock() { _tile_release(); }  // other users of AMX in this thread, such as torch, expect this
    AmxBlock(const AmxBlock&) = delete;
    AmxBlock& operator=(const AmxBlock&) = delete;

    void zero() {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }

    void load(const float* y, size_t stride) {
        asm volatile("" ::: "memory");
        _tile_loadd(0, y, stride * sizeof(float));
        _tile_loadd(1, y + 16, stride * sizeof(float));
        if (!has_lower_) return;
        _tile_loadd(2, y + kAmxRows * stride, stride * sizeof(float));
        _tile_loadd(3, y + kAmxRows * stride + 16, stride * sizeof(float));
    }

    // The sums += x (rows, 2 · pairs) times w (pairs, 32, 2), given as two halves of 16 columns with rows `w_stride`
    // numbers apart.
    void add(const bf16* x, size_t x_stride, const bf16* w_left, const bf16* w_right, size_t w_stride) {
        asm volatile("" ::: "memory");
        _tile_loadd(6, w_left, w_stride * sizeof(bf16));
        _tile_loadd(7, w_right, w_stride * sizeof(bf16));
        _tile_loadd(4, x, x_stride * sizeof(bf16));
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (!has_lower_) return;
        _tile_loadd(5, x + kAmxRows * x_stride, x_stride * sizeof(bf16));
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }

    void store(float* y, size_t stride) const {
        _tile_stored(0, y, stride * sizeof(float));
        _tile_stored(1, y + 16, stride * sizeof(float));
        if (has_lower_) {
            _tile_stored(2, y + kAmxRows * stride, stride * sizeof(float));
            _tile_stored(3, y + kAmxRows * stride + 16, stride * sizeof(float));
        }
        asm volatile("" ::: "memory");
    }

  private:
    bool has_lower_;
};

// y (rows, 32) = x (rows, 2 · pairs) times one tile w, or y += that; 1 to 32 rows, pairs a multiple of 16.
template <bool add, class Prefetched>
inline void multiply_amx_block(const bf16* x, size_t x_stride, int rows, const bf16* w, int pairs, float* y,
                               size_t y_stride, Prefetched& lines) {
    AmxBlock block(rows);
    if (add)
        block.load(y, y_stride);
    else
        block.zero();
    for (int pair = 0; pair < pairs; pair += kAmxPairs) {
        const bf16* weights = w + static_cast<size_t>(pair) * 2 * kTile;
        for (int i = 0; i < kAmxPairs; i++) lines.prefetch_some();
        block.add(x + 2 * pair, x_stride, weights, weights + kTile, 2 * kTile);
    }
    block.store(y, y_stride);
}
