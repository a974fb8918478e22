// A small frame for tests of kernels: tests by name, numbers that are always the same, and bounds of rounding errors.
//
// A kernel is held to a slow exact form of it in doubles. What they may differ by follows from how often the kernel
// rounds, and from the size of what it rounds.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "seam/abi.h"

constexpr double kU32 = 1.0 / (1 << 24);  // how far off, relatively, rounding to fp32 may be
constexpr double kU16 = 1.0 / (1 << 8);   // and to bf16
constexpr double kExp = 4 * kU32;         // and exp16, which is within 3 ulp

// How far off, relatively to the sum of the magnitudes, a sum of `count` rounded products may be (Higham, 3.1).
inline double sum_error(double count) { return count * kU32 / (1 - count * kU32); }

struct Test {
    const char* name;
    void (*run)();
};
std::vector<Test>& tests();
struct Registered {
    Registered(const char* name, void (*run)()) { tests().push_back({name, run}); }
};
#define TEST(name)                                   \
    static void name();                              \
    static const Registered of_##name(#name, &name); \
    static void name()

// Both end a test that they find failed.
void expect(bool is_so, const char* format, ...) __attribute__((format(printf, 2, 3)));
void expect_near(double found, double exact, double bound, const char* format, ...)
    __attribute__((format(printf, 4, 5)));

// SplitMix64 (Steele et al. 2014).
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        uint64_t z = state_ += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9, z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    double uniform(double from, double to) { return from + (to - from) * (double)(next() >> 11) / (1ull << 53); }
    int64_t below(int64_t count) { return (int64_t)(next() % (uint64_t)count); }

  private:
    uint64_t state_;
};

inline float to_float(bf16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// To the nearest, ties to even; not for NaN.
inline bf16 to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Numbers between -1 and 1.
inline std::vector<bf16> random_bf16(Random& random, size_t count, double scale = 1.0) {
    std::vector<bf16> x(count);
    for (auto& of : x) of = to_bf16((float)random.uniform(-scale, scale));
    return x;
}
inline std::vector<float> random_floats(Random& random, size_t count, double scale = 1.0) {
    std::vector<float> x(count);
    for (auto& of : x) of = (float)random.uniform(-scale, scale);
    return x;
}

// Room for an answer, between numbers that must stay as they are.
template <class T>
class Fenced {
  public:
    explicit Fenced(size_t count, T value = T(77)) : value_(value), all_(count + 2 * kFence, value) {}
    T* data() { return all_.data() + kFence; }
    T& operator[](size_t i) { return all_[kFence + i]; }
    // Ends the test where anything outside [0, count) was written.
    void check(const char* what) const {
        for (size_t i = 0; i < kFence; i++)
            expect(all_[i] == value_ && all_[all_.size() - 1 - i] == value_, "%s: written outside", what);
    }

  private:
    static constexpr size_t kFence = 64;
    T value_;
    std::vector<T> all_;
};
