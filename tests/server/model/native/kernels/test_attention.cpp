#include "kernels/attention.h"

#include "check.h"
#include "exact_attention.h"

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
            const float found =
                exponentials(scores.data(), count, scale, [&](int i, F32x16 x) { store(&scores[i], x); });
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
    int dim;
    std::vector<bf16> k, v;
    std::vector<float> keys, values;  // (length, kv_heads, dim), as they were put there
    std::vector<int32_t> blocks;
    CacheView view;

    Cache(Random& random, int length, int block_size, int kv_heads, int dim) : dim(dim) {
        const int used = (length + block_size - 1) / block_size, num_blocks = 2 * used + 1;
        const size_t size = (size_t)block_size * kv_heads * dim, stride = 3 * size;  // of the second of three layers
        k.assign(num_blocks * stride, 0x7fc0), v = k;
        view = {k.data() + size, v.data() + size, block_size, kv_heads, dim, stride};
        for (int i = 0; i < used; i++) blocks.push_back(2 * used - 2 * i - (i % 2));
        for (int i = 0; i < length * kv_heads * dim; i++) {
            keys.push_back(to_float(to_bf16((float)random.uniform(-2, 2))));
            values.push_back(to_float(to_bf16((float)random.uniform(-1, 1))));
        }
        for (int position = length - 1; position >= 0; position--)
            for (int head = 0; head < kv_heads; head++) {
                view.put_key(blocks.data(), position, head, &keys[at(position, head)]);
                view.put_value(blocks.data(), position, head, &values[at(position, head)]);
            }
    }
    NextKeys next() const { return {blocks.data(), (int)blocks.size() * view.block_size / kPositions, 0}; }
    size_t at(int position, int head) const { return ((size_t)position * view.kv_heads + head) * dim; }
};

TEST(what_is_put_into_a_paged_cache) {
    const int32_t blocks[] = {2, 0};
    for (int position = 0; position < 64; position++)
        for (int head = 0; head < 3; head++) {
            const int dim = 64, block_size = 32;
            const size_t size = (size_t)block_size * 3 * dim, stride = 2 * size;  // of the second of two layers
            std::vector<bf16> k(3 * stride, 0x7fc0), v = k;
            const CacheView view{k.data() + size, v.data() + size, block_size, 3, dim, stride};
            float numbers[64];
            for (int d = 0; d < dim; d++) numbers[d] = (float)(d + 1);
            view.put_key(blocks, position, head, numbers), view.put_value(blocks, position, head, numbers);
            const size_t first = size + blocks[position / 32] * stride + (head * 2 + position % 32 / 16) * 16 * dim;
            const int inside = position % 16;
            for (int d = 0; d < dim; d++) {
                expect(to_float(k[first + (d / 2 * 16 + inside) * 2 + d % 2]) == numbers[d], "key %d", d);
                const size_t of = first + ((d / 32 * 8 + inside / 2) * 32 + d % 32) * 2 + inside % 2;
                expect(to_float(v[of]) == numbers[d], "value %d", d);
            }
            for (auto* cache : {&k, &v})
                expect(std::count(cache->begin(), cache->end(), 0x7fc0) == (long)cache->size() - dim, "others");
        }
}

static void check_attend(int group, int dim, int position, int tokens, int block_size, AttentionScratch& scratch) {
    Random random(group + 10 * dim + 1000 * position + tokens);
    const int kv_heads = 2, rows = tokens * group, length = position + tokens;
    const Cache cache(random, length, block_size, kv_heads, dim);
    const auto q = random_bf16(random, (size_t)rows * dim, 2);
    for (int kv_head = 0; kv_head < kv_heads; kv_head++) {
        Fenced<float> out((size_t)rows * dim);
        const Attention of{cache.view, cache.blocks.data(), kv_head, rows, group, position};
        attend(of, q.data(), cache.next(), out.data(), scratch);
        out.check("attend");
        for (int row = 0; row < rows; row++) {
            const int seen = position + row / group + 1;
            std::vector<bf16> narrow(dim);
            const ExactWeights weights(&q[row * dim], dim, seen, [&](int i) {
                for (int d = 0; d < dim; d++) narrow[d] = to_bf16(cache.keys[cache.at(i, kv_head) + d]);
                return narrow.data();
            });
            for (int d = 0; d < dim; d++) {
                double exact = 0, size = 0;
                for (int i = 0; i < seen; i++) {
                    const double product = weights.p[i] * cache.values[cache.at(i, kv_head) + d];
                    exact += product, size += std::abs(product);
                }
                expect_near(out[row * dim + d], exact, size * (kU16 + weights.error + sum_error(seen + 34)),
                            "row %d of %d, dim %d, from %d: %d", row, rows, dim, position, d);
            }
        }
    }
}

TEST(attend_to_a_paged_cache) {
    AttentionScratch scratch;
    for (int group = 1; group <= kMaxGroup; group++)
        for (int length : {1, 16, 33}) check_attend(group, 32, length - 1, 1, 16, scratch);
    for (int dim : {32, 64, 96, 128})
        for (int length : {1, 2, 15, 16, 17, 31, 32, 100}) check_attend(3, dim, length - 1, 1, 16, scratch);
    for (int group : {1, 3, 8}) check_attend(group, 32, 0, 17, 16, scratch);
    for (int position : {0, 1, 15, 16, 31, 32, 33, 64})
        for (int tokens : {1, 5, 16, 31, 33}) check_attend(2, 32, position, tokens, 16, scratch);
    for (int dim : {64, 96, 128}) check_attend(3, dim, 7, 40, 16, scratch);
    for (int block_size : {32, 48}) check_attend(2, 64, 30, 35, block_size, scratch);
}

// All tokens at once, or some of them, or one by one: the same bits.
TEST(attend_to_any_number_of_tokens) {
    const int group = 3, dim = 64, length = 83;
    Random random(5);
    const Cache cache(random, length, 16, 1, dim);
    const auto q = random_bf16(random, (size_t)length * group * dim, 2);
    std::vector<float> whole((size_t)length * group * dim), found(whole.size());
    AttentionScratch scratch;
    auto some = [&](int start, int count) {
        return Attention{cache.view, cache.blocks.data(), 0, count * group, group, start};
    };
    attend(some(0, length), q.data(), cache.next(), whole.data(), scratch);
    for (int tokens : {1, 2, 3, 4, 5, 7, 16, 31, 82}) {
        for (int start = 0; start < length; start += tokens) {
            const int now = std::min(tokens, length - start);
            attend(some(start, now), &q[(size_t)start * group * dim], cache.next(), &found[(size_t)start * group * dim],
                   scratch);
        }
        expect(!memcmp(found.data(), whole.data(), whole.size() * sizeof(float)), "%d tokens at once", tokens);
    }
}

TEST(infinite_values_have_no_effect_on_tokens_before_them) {
    const int group = 3, start = 8, tokens = 29, length = start + tokens;
    AttentionScratch scratch;
    for (int dim : {32, 64, 96})
        for (int position : {9, 15, 16, 20, 31, 35, 36})
            for (float bad : {INFINITY, -INFINITY, NAN}) {
                Random random(dim + position);
                Cache cache(random, length, 16, 1, dim);
                const auto q = random_bf16(random, (size_t)tokens * group * dim, 2);
                const Attention of{cache.view, cache.blocks.data(), 0, tokens * group, group, start};
                std::vector<float> clean((size_t)tokens * group * dim), found(clean.size());
                attend(of, q.data(), cache.next(), clean.data(), scratch);
                std::vector<float> value(dim, 1.0f);
                value[5] = value[dim - 1] = bad;
                cache.view.put_value(cache.blocks.data(), position, 0, value.data());
                attend(of, q.data(), cache.next(), found.data(), scratch);
                const size_t before = (size_t)(position - start) * group * dim;
                expect(!memcmp(found.data(), clean.data(), before * sizeof(float)), "dim %d, position %d", dim,
                       position);
                for (size_t i = before; i < found.size(); i++)
                    expect(std::isfinite(found[i]) == (i % dim != 5 && (int)i % dim != dim - 1), "at %zu", i);
            }
}
