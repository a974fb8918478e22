// Lines of cache that a product prefetches while it multiplies: what is read next, its own weights or others'.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "simd/simd.h"

constexpr size_t kBytesAhead = 8192;  // by which weights are prefetched in advance: by 2 KB they come half as fast

// Fetches a line of cache that is read soon, into the second cache. The first cache waits for few lines at once: pieces
// of 2 KB come at 13 GB/s into the first and at 20 GB/s into the second.
inline void prefetch_line(const void* line) { __builtin_prefetch(line, 0, 2); }

// The addresses of lines, which are prefetched one after the other; behind the last one it is there a few times more.
template <int step>
struct Lines {
    const char *const *next, *const *last;

    // What a product of a pair of inputs leaves time for: `step` lines, 1 or 2.
    void prefetch_some() {
        prefetch_line(next[0]);
        if (step == 2) prefetch_line(next[1]);
        next += next < last ? step : 0;
    }
    void prefetch(size_t count) {
        for (const char* const* stop = std::min(next + count, last); next < stop; next++) prefetch_line(*next);
    }
};
struct NoLines {
    void prefetch_some() {}
    void prefetch(size_t) {}
};

// The lines that one product prefetches; who adds to it leaves it to the product, which empties it.
class PrefetchList {
  public:
    void clear() { count_ = 0; }
    void add(const void* from, size_t bytes) {
        const size_t lines = (bytes + kLine - 1) / kLine;
        if (lines_.size() < count_ + lines + 8) lines_.resize(2 * (count_ + lines + 8));
        for (size_t i = 0; i < lines; i += 8)
            store_lines(&lines_[count_ + i], static_cast<const char*>(from) + i * kLine);
        count_ += lines;
    }
    size_t size() const { return count_; }
    // All of them, of which there is one at least, until more are added.
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
