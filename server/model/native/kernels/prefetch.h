// Cache lines that a product prefetches while it multiplies: its own weights, or what is read after them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "simd/simd.h"

constexpr size_t kBytesAhead = 8192;  // prefetch distance of weights; 2 KB halves the bandwidth

// Prefetches a cache line into L2. L1 has few outstanding misses: pieces of 2 KB arrive at 13 GB/s in L1, but at 20
// GB/s in L2.
inline void prefetch_line(const void* line) { __builtin_prefetch(line, 0, 2); }

// Addresses of lines to prefetch, in order. After the last address the array repeats it a few times.
template <int step>
struct Lines {
    const char *const *next, *const *last;

    // Prefetches `step` lines, 1 or 2: as many as the product of one pair of inputs leaves time for.
    void prefetch_some() {
        prefetch_line(next[0]);
        if (step == 2) prefetch_line(next[1]);
        next += next < last ? step : 0;
    }
    // Prefetches up to `count` lines.
    void prefetch(size_t count) {
        for (const char* const* stop = std::min(next + count, last); next < stop; next++) prefetch_line(*next);
    }
};
struct NoLines {  // nothing to prefetch
    void prefetch_some() {}
    void prefetch(size_t) {}
};

// The lines that the next product prefetches. Callers add to it; the product clears it.
class PrefetchList {
  public:
    void clear() { count_ = 0; }
    void add(const void* first, size_t bytes) {
        const size_t lines = (bytes + kLine - 1) / kLine;
        if (lines_.size() < count_ + lines + 8) lines_.resize(2 * (count_ + lines + 8));
        for (size_t i = 0; i < lines; i += 8)
            store_lines(&lines_[count_ + i], static_cast<const char*>(first) + i * kLine);
        count_ += lines;
    }
    size_t size() const { return count_; }
    // All lines; there must be at least one. Valid until more are added.
    template <int step>
    Lines<step> lines() {
        lines_[count_] = lines_[count_ + 1] = lines_[count_ + 2] = lines_[count_ - 1];
        return {lines_.data(), lines_.data() + count_};
    }

  private:
    static constexpr size_t kLine = 64;
    std::vector<const char*> lines_;
    size_t count_ = 0;
};
