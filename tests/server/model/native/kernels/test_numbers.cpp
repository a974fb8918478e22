#include <limits>

#include "check.h"
#include "kernels/layers.h"

static float lane(F32x16 x, int i) {
    float all[16];
    store(all, x);
    return all[i];
}

TEST(exp16_is_within_3_ulp) {
    Random random(1);
    auto check = [](float x) {
        const double exact = std::exp((double)x);
        const float found = lane(exp16(broadcast(x)), 5);
        int exponent;
        frexp(exact, &exponent);
        expect_near(found, exact, 3 * std::ldexp(1.0, std::max(exponent - 24, -149)), "exp(%.9g)", x);
    };
    for (float x : {0.0f, -0.0f, 1.0f, -1.0f, 88.0f, -87.0f, -88.0f, -100.0f, -103.0f, 1e-30f, -1e-30f}) check(x);
    for (int i = -60; i <= 60; i++)  // where n changes
        for (int k = -3; k <= 3; k++) check((float)((i + 0.5) * 0.69314718055994531) + k * 1e-6f);
    for (int i = 0; i < 200000; i++) check((float)random.uniform(-104, 88));
}

TEST(exp16_ends_somewhere) {
    const float inf = std::numeric_limits<float>::infinity();
    for (float x : {-104.5f, -1000.0f, -inf}) expect_near(lane(exp16(broadcast(x)), 0), 0, 1e-44, "exp(%g)", x);
    for (float x : {88.5f, 1000.0f, inf})
        expect_near(lane(exp16(broadcast(x)), 0), std::exp(88.0), std::exp(88.0) * kExp, "exp(%g)", x);
    expect(std::isnan(lane(exp16(broadcast(std::nanf(""))), 0)), "exp(NaN) must be NaN");
}

TEST(lanes_are_apart) {
    float x[16], found[16];
    for (int i = 0; i < 16; i++) x[i] = (float)i - 8;
    store(found, exp16(load(x)));
    for (int i = 0; i < 16; i++)
        expect_near(found[i], std::exp((double)x[i]), std::exp((double)x[i]) * kExp, "lane %d", i);
}

TEST(bf16_rounds_to_the_nearest) {
    Random random(2);
    float x[16];
    bf16 found[16];
    for (int round = 0; round < 20000; round++) {
        for (float& of : x) {
            of = std::ldexp((float)random.uniform(-2, 2), (int)random.below(60) - 30);
            if (round % 3 == 0) of = to_float(to_bf16(of)) * (1 + (float)(random.below(3) - 1) / 256);  // ties
        }
        store_bf16(found, load(x));
        for (int i = 0; i < 16; i++) expect(found[i] == to_bf16(x[i]), "%a is rounded to %x", x[i], found[i]);
    }
}

TEST(bf16_comes_back) {
    for (int first = 0; first < 1 << 16; first += 16) {
        bf16 x[16], back[16];
        for (int i = 0; i < 16; i++) x[i] = (bf16)(first + i);
        const F32x16 wide = load_bf16(x);
        store_bf16(back, wide);
        for (int i = 0; i < 16; i++) {
            const float exact = to_float(x[i]);
            if (std::isnan(exact)) continue;
            expect(lane(wide, i) == exact, "%x is widened to %a", x[i], lane(wide, i));
            if (exact == 0 || std::isnormal(exact) || std::isinf(exact)) expect(back[i] == x[i], "%x comes back", x[i]);
        }
    }
}

TEST(first_lanes_are_so_many) {
    for (int count = -3; count <= 20; count++)
        for (int i = 0; i < 16; i++)
            expect((first_lanes(count) >> i & 1) == (i < count), "lane %d of the first %d", i, count);
}

TEST(silu_of_numbers) {
    Random random(3);
    for (int i = 0; i < 100000; i++) {
        const float x = (float)random.uniform(-30, 30);
        const double exact = 1 / (1 + std::exp(-(double)x));
        expect_near(lane(silu(broadcast(x)), 0), x * exact, std::abs(x) * exact * (kExp + 3 * kU32), "silu(%.9g)", x);
    }
    for (float x : {-200.0f, 200.0f, 0.0f})
        expect_near(lane(silu(broadcast(x)), 0), x > 0 ? x : 0, 1e-35, "silu(%g)", x);
}
