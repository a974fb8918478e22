#include "kernels/dropout.h"

#include "check.h"

namespace {

// The hash of dropout.h, number by number.
uint32_t hash_of(uint64_t key, uint32_t counter) {
    uint32_t x = (uint32_t)key + counter * 0x61c88647u;
    x ^= x >> 16, x += (uint32_t)(key >> 32);
    for (uint32_t multiplier : {0x21f0aaadu, 0x735a2d97u}) x *= multiplier, x ^= x >> 16;
    return x;
}

bool is_kept(uint64_t key, int64_t place, int64_t num_dropped, int64_t in, int64_t feature) {
    const uint32_t hash = hash_of(key, (uint32_t)(place * 65536 + feature % (in / 2)));
    return (int16_t)(feature < in / 2 ? hash : hash >> 16) >= num_dropped - 32768;
}

}  // namespace

TEST(dropout_masks) {
    Random random(1);
    for (int64_t in : {32, 64, 96, 1536})
        for (int64_t num_dropped : {0, 1, 3277, 32768, 65535}) {
            const int tokens = 6, start = 1, rows = 4;
            const int64_t place = random.below(1000);
            std::vector<uint64_t> keys(tokens);
            for (uint64_t& key : keys) key = random.next();
            keys[2] = ~0ull, keys[3] = 0;
            Fenced<uint16_t> kept((size_t)(tokens * in / 16));
            draw_kept(keys.data(), place, num_dropped, in, start, rows, kept.data());
            kept.check("draw_kept");
            for (int64_t i = 0; i < tokens * in / 16; i++) {
                const int64_t token = i / (in / 16), first = i % (in / 16) * 16;
                uint16_t expected = 0;
                for (int64_t k = 0; k < 16; k++)
                    expected |= (uint16_t)(is_kept(keys[token], place, num_dropped, in, first + k) << k);
                const bool is_given = token >= start && token < start + rows;
                expect(kept[i] == (is_given ? expected : 77), "token %ld, feature %ld of %ld, %ld dropped", token,
                       first, in, num_dropped);
            }
        }
}

TEST(features_that_are_kept) {
    Random random(2);
    const int in = 48, tokens = 5, start = 1, rows = 3;
    const auto x = random_bf16(random, in * tokens);
    std::vector<uint16_t> kept(x.size() / 16);
    for (auto& of : kept) of = (uint16_t)random.next();
    Fenced<bf16> y(x.size());
    keep(kept.data(), 1.25, x.data(), in, start, rows, y.data());
    for (int i = 0; i < in * tokens; i++) {
        const bool is_given = i >= in * start && i < in * (start + rows);
        const bool is_set = kept[i / 16] >> i % 16 & 1;
        expect(y[i] == (!is_given ? 77 : is_set ? to_bf16(to_float(x[i]) * 1.25f) : 0), "feature %d", i);
    }
}
