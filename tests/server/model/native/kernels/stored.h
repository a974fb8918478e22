// Weights in GGUF's blocks, and what they stand for, each computed by itself.
#pragma once
#include "check.h"
#include "kernels/matrix.h"

struct Stored {
    WeightType type;
    std::vector<uint8_t> blocks;
    std::vector<bf16> values;

    // Of `count` weights. Scales are up to `largest`, or any finite ones, subnormals too, where that is 0.
    Stored(Random& random, WeightType type, int64_t count, double largest = 0) : type(type) {
        const size_t size = type == kQ4_1 ? sizeof(BlockQ4_1) : sizeof(BlockQ8_0);
        for (int64_t i = 0; i < count / kTile; i++) {
            std::vector<uint8_t> block(size);
            for (auto& of : block) of = (uint8_t)random.next();
            const uint16_t scale = half(random, largest), least = half(random, 8 * largest);
            memcpy(block.data(), &scale, 2);
            if (type == kQ4_1) memcpy(&block[2], &least, 2);
            for (int input = 0; input < kTile; input++) {
                const int code = type == kQ8_0       ? (int8_t)block[2 + input]
                                 : input < kTile / 2 ? block[4 + input] & 15
                                                     : block[4 + input - kTile / 2] >> 4;
                const float product = from_half(scale) * (float)code;
                values.push_back(to_bf16(type == kQ8_0 ? product : product + from_half(least)));
            }
            blocks.insert(blocks.end(), block.begin(), block.end());
        }
    }
    BaseTensor tensor() const { return {values.data(), type, blocks.data()}; }

  private:
    static uint16_t half(Random& random, double largest) {
        if (largest > 0) {  // a power of two, with any fraction
            const int exponent = std::ilogb(random.uniform(largest / 16, largest)) + 15;
            return (uint16_t)(exponent << 10 | (random.next() & 0x83ff));
        }
        const auto bits = (uint16_t)random.next();
        return (bits >> 10 & 31) == 31 ? bits ^ 0x4000 : bits;  // the largest exponent says infinite
    }
    static float from_half(uint16_t bits) {
        const int exponent = bits >> 10 & 31, fraction = bits & 1023;
        const double value = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
        return (float)(bits >> 15 ? -value : value);
    }
};
