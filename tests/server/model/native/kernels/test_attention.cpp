#include "kernels/attention.h"

#include "check.h"
#include "exact_attention.h"

TEST(sums16_adds_each_register_up) {
    Random random(1);
    const auto x = random_floats(random, 256);
    __m512 v[16];
    for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_ps(&x[16 * i]);
    float found[16];
    _mm512_storeu_ps(found, sums16(v));
    for (int i = 0; i < 16; i++) {
        double exact = 0, size = 0;
        for (int k = 0; k < 16; k++) exact += x[16 * i + k], size += std::abs(x[16 * i + k]);
        expect_near(found[i], exact, sum_error(4) * size, "register %d", i);
    }
}

TEST(exponentials_of_scores) {
    Random random(2);
    for (int count : {1, 2, 15, 16, 17, 31, 32, 33, 100}) {
        const int width = (count + 15) / 16 * 16;
        for (double spread : {1.0, 50.0, 1000.0}) {
            auto scores = random_floats(random, width, spread);
            for (int i = count; i < width; i++) scores[i] = 1e30f;  // left over from others
            const std::vector<float> given = scores;
            const float scale = 0.125f;
            const double most = *std::max_element(given.begin(), given.begin() + count);
            const float found = exponentials(scores.data(), count, scale);
            double sum = 0;
            for (int i = 0; i < width; i++) {
                const double exact = i < count ? std::exp(scale * (given[i] - most)) : 0;
                const double error = exact * (kExp + 2 * kU32 * scale * std::abs(given[i] - most));
                expect_near(scores[i], exact, error + 1e-44, "%d scores: %d", count, i);
                sum += scores[i];
            }
            expect_near(found, sum, sum_error(width / 16 + 4) * sum, "the sum of %d", count);
        }
    }
}

// A paged cache whose blocks are handed out in no order; what nobody owns is NaN.
struct Cache {
    std::vector<bf16> k, v;
    std::vector<int32_t> blocks;
    CacheView view;

    Cache(Random& random, int length, int block_size, int kv_heads, int dim) {
        const int used = (length + block_size - 1) / block_size, num_blocks = 2 * used + 1;
        k.assign((size_t)num_blocks * block_size * kv_heads * dim, 0x7fc0), v = k;
        view = {k.data(), v.data(), block_size, kv_heads, dim};
        for (int i = 0; i < used; i++) blocks.push_back(2 * used - 2 * i - (i % 2));
        for (int position = 0; position < length; position++)
            for (int head = 0; head < kv_heads; head++) {
                const size_t at = view.offset(blocks.data(), position, head);
                for (int d = 0; d < dim; d++) {
                    k[at + d] = to_bf16((float)random.uniform(-2, 2)),
                           v[at + d] = to_bf16((float)random.uniform(-1, 1));
                }
            }
    }
    auto key(int head) const {
        return [this, head](int i) { return &k[view.offset(blocks.data(), i, head)]; };
    }
    auto value(int head) const {
        return [this, head](int i) { return &v[view.offset(blocks.data(), i, head)]; };
    }
};

TEST(offsets_in_a_paged_cache) {
    const int32_t blocks[] = {7, 2, 5};
    const CacheView view{nullptr, nullptr, 4, 3, 32};
    for (int position = 0; position < 12; position++)
        for (int head = 0; head < 3; head++)
            expect(view.offset(blocks, position, head) ==
                       (size_t)((blocks[position / 4] * 4 + position % 4) * 3 + head) * 32,
                   "position %d, head %d", position, head);
}

static void check_attend_one(int group, int dim, int length, int block_size, AttentionScratch& scratch) {
    Random random(group + 10 * dim + 1000 * length + block_size);
    const int kv_heads = 2;
    const Cache cache(random, length, block_size, kv_heads, dim);
    const auto q = random_bf16(random, (size_t)group * dim, 2);
    for (int kv_head = 0; kv_head < kv_heads; kv_head++) {
        Fenced<bf16> out((size_t)group * dim);
        attend_one(group, q.data(), cache.view, cache.blocks.data(), kv_head, length, out.data(), scratch);
        out.check("attend_one");
        for (int head = 0; head < group; head++) {
            const ExactWeights weights(&q[head * dim], dim, length, cache.key(kv_head));
            for (int d = 0; d < dim; d++) {
                double exact = 0, size = 0;
                for (int i = 0; i < length; i++) {
                    const double product = weights.p[i] * to_float(cache.value(kv_head)(i)[d]);
                    exact += product, size += std::abs(product);
                }
                const double error = size * (weights.error + sum_error(length + 2));
                expect_near(to_float(out[head * dim + d]), exact, error + kU16 * (std::abs(exact) + error),
                            "group %d of %d, dim %d, %d positions: %d", head, group, dim, length, d);
            }
        }
    }
}

TEST(attend_one_token) {
    AttentionScratch scratch;
    for (int group = 1; group <= kMaxGroup; group++)
        for (int length : {1, 16, 33}) check_attend_one(group, 32, length, 16, scratch);
    for (int dim : {32, 64, 96, 128})
        for (int length : {1, 2, 15, 16, 17, 31, 32, 100}) check_attend_one(3, dim, length, 16, scratch);
    for (int block_size : {1, 5, 24, 64}) check_attend_one(2, 64, 77, block_size, scratch);
}

static void check_packed(int group, int dim, int position, int tokens, int block_size, AttentionScratch& scratch) {
    Random random(group + 10 * dim + 1000 * position + tokens);
    const int kv_heads = 2, rows = tokens * group, length = position + tokens;
    const Cache cache(random, length, block_size, kv_heads, dim);
    const auto q = random_bf16(random, (size_t)rows * dim, 2);
    for (int kv_head = 0; kv_head < kv_heads; kv_head++) {
        PackedCache packed{cache.blocks.data(), kv_head, length, nullptr, nullptr};
        expect(packed.tiles() == (length + 31) / 32, "%d tiles", packed.tiles());
        Fenced<bf16> k((size_t)packed.tiles() * kTile * dim), v((size_t)packed.tiles() * kTile * dim);
        packed.k = k.data(), packed.v = v.data();
        for (int tile = packed.tiles() - 1; tile >= 0; tile--) packed.pack(cache.view, tile);
        k.check("packed keys"), v.check("packed values");
        Fenced<float> out((size_t)rows * dim);
        packed.attend(q.data(), rows, group, position, dim, out.data(), scratch);
        out.check("attend");
        for (int row = 0; row < rows; row++) {
            const int seen = position + row / group + 1;
            const ExactWeights weights(&q[row * dim], dim, seen, cache.key(kv_head));
            for (int d = 0; d < dim; d++) {
                double exact = 0, size = 0;
                for (int i = 0; i < seen; i++) {
                    const double product = weights.p[i] * to_float(cache.value(kv_head)(i)[d]);
                    exact += product, size += std::abs(product);
                }
                expect_near(out[row * dim + d], exact, size * (kU16 + weights.error + sum_error(seen + 34)),
                            "row %d of %d, dim %d, from %d: %d", row, rows, dim, position, d);
            }
        }
    }
}

TEST(attend_to_packed_keys) {
    AttentionScratch scratch;
    for (int group : {1, 3, 8}) check_packed(group, 32, 0, 17, 16, scratch);
    for (int position : {0, 1, 15, 16, 31, 32, 33, 64})
        for (int tokens : {1, 5, 16, 31, 33}) check_packed(2, 32, position, tokens, 16, scratch);
    for (int dim : {64, 96, 128}) check_packed(3, dim, 7, 40, 16, scratch);
    for (int block_size : {1, 24}) check_packed(2, 64, 30, 35, block_size, scratch);
}
