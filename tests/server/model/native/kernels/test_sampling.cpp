// The native sampler's parts; whole answers are held to torch's by tests/server/engine/sampling.
#include "kernels/sampling.h"

#include "tiny_base.h"

TEST(log16_is_within_2_ulp) {
    Random random(1);
    auto check = [](float x) {
        float found[16];
        store(found, log16(broadcast(x)));
        const double exact = std::log((double)x);
        int exponent;
        frexp(exact, &exponent);
        expect_near(found[7], exact, exact == 0 ? 0 : 2 * std::ldexp(1.0, exponent - 24), "log(%.9g)", x);
    };
    for (float x : {1.0f, 0.75f, 1.5f, 0.5f, 2.0f, 0x1p-126f, 3e38f}) check(x);
    for (int i = 1; i < 5000; i++) check(1 - (float)i * 0x1p-24f), check(1 + (float)i * 0x1p-23f);
    for (int i = 0; i < 200000; i++) check((float)random.uniform(0, 1)), check((float)random.uniform(0, 20));
    for (int i = 0; i < 20000; i++) check(std::ldexp((float)random.uniform(1, 2), (int)random.below(250) - 125));
}

TEST(gumbel16_is_a_hash_of_key_and_token) {
    Random random(2);
    double most = 0;
    for (int round = 0; round < 20000; round++) {
        const auto key = (int64_t)random.next();
        int tokens[16];
        float found[16];
        for (int& token : tokens) token = (int)random.below(50000);
        store(found, gumbel16(load_u32(tokens), key));
        for (int i = 0; i < 16; i++) {
            auto x = (uint32_t)tokens[i] ^ (uint32_t)key;
            x = (x ^ x >> 16) * 0x7feb352du ^ (uint32_t)(key >> 32);
            x = (x ^ x >> 15) * 0x846ca68bu;
            x ^= x >> 16;
            const double exact = -std::log(-std::log(((x >> 9) + 0.5) / (1 << 23)));
            // Of the inner logarithm, relatively; of the outer one.
            expect_near(found[i], exact, 4 * kU32 + 4 * kU32 * std::abs(exact), "the noise of %d", tokens[i]);
            most = std::max(most, (double)found[i]);
        }
    }
    expect(most > 10 && most < kMaxNoise, "noise up to %g", most);
    const double bound = -std::log(-std::log1p(-0x1p-24));
    expect(bound + 0.05 < kMaxNoise, "kMaxNoise is below %g", bound);
}

// Whatever stands in the tables, a call is refused or reads and writes where it may: sanitizers would tell.
TEST(tables_of_samples_of_any_numbers) {
    Random random(3);
    const TinyBase base(random);
    const Native native = Native::serving(base, 2);
    const int64_t vocab = base.sizes.vocab, num_rows = 5, max_top = 4;
    std::vector<int64_t> seen{3, 5, 8, 3, 1}, added_ids{2, 3, 5, 7};
    std::vector<double> added{1, -2, 3.5, -100};
    const std::vector<uint8_t> forbidden = [&] {
        std::vector<uint8_t> all((size_t)vocab);
        for (auto& of : all) of = random.below(2);
        return all;
    }();
    std::vector<SampleRow> rows;
    for (int64_t i = 0; i < num_rows; i++)
        rows.push_back({0.5 * (double)i, i % 2 ? 0.9 : 1.0, 0.01, i == 3 ? 7 : 0, i, i,
                        i % 2 ? forbidden.data() : nullptr, 1.2, i, 1, i % 4, 4 - i % 4});
    std::vector<float> logits((size_t)(num_rows * vocab));
    auto fill = [&] {
        for (float& of : logits) of = (float)random.uniform(-5, 5);
    };
    Fenced<int64_t> token_ids(num_rows), top_ids(num_rows * max_top);
    Fenced<float> logprobs(num_rows * (1 + max_top));
    SampleStep step{
        num_rows,         nullptr,      logits.data(),         rows.data(), seen.data(),      (int64_t)seen.size(),
        added_ids.data(), added.data(), (int64_t)added.size(), max_top,     token_ids.data(), logprobs.data(),
        top_ids.data()};
    auto check = [&] {
        token_ids.check("ids"), top_ids.check("the likeliest ids"), logprobs.check("log-probabilities");
        for (int64_t i = 0; i < num_rows; i++)
            expect(token_ids[i] >= -1 && token_ids[i] < vocab, "token %ld", token_ids[i]);
    };
    fill();
    SUCCEED(smolora_sample, native.object.get(), &step);
    check();
    std::vector<int64_t*> numbers;
    for (auto* ids : {&seen, &added_ids})
        for (int64_t& id : *ids) numbers.push_back(&id);
    for (double& value : added) numbers.push_back((int64_t*)&value);
    for (SampleRow& row : rows)
        for (int64_t* field : {(int64_t*)&row.temperature, (int64_t*)&row.top_p, (int64_t*)&row.min_p, &row.top_k,
                               &row.key, &row.num_top, (int64_t*)&row.repetition_penalty, &row.first_seen,
                               &row.num_seen, &row.first_added, &row.num_added})
            numbers.push_back(field);
    int num_refused = 0, num_done = 0;
    for (int round = 0; round < 4000; round++) {
        int64_t& number = *numbers[(size_t)random.below((int64_t)numbers.size())];
        const int64_t before = number;
        const double doubles[] = {NAN, INFINITY, -INFINITY, 1e-300, 1e300, -1, 2, 1e-40};
        const int64_t others[] = {-1,        before + 1, before - 1,     0, 1ll << 31, INT64_MAX,
                                  INT64_MIN, vocab,      random.below(9)};
        if (random.below(2))
            number = others[random.below(std::size(others))];
        else
            memcpy(&number, &doubles[random.below(std::size(doubles))], 8);
        fill();
        if (round % 8 == 0) logits[(size_t)random.below(num_rows * vocab)] = round % 16 ? NAN : INFINITY;
        char error[kErrorSize] = "";
        const int status = smolora_sample(native.object.get(), &step, error);
        expect(status == kOk || (status == kInvalid && *error), "%ld: status %d, %s", number, status, error);
        if (status == kOk) check();
        (status == kOk ? num_done : num_refused)++;
        number = before;
    }
    expect(num_refused > 500 && num_done > 500, "%d were refused, %d done", num_refused, num_done);
    char error[kErrorSize] = "";
    for (int64_t wrong : {-1l, vocab + 1}) {
        step.max_top = wrong;
        expect(smolora_sample(native.object.get(), &step, error) == kInvalid, "%ld likeliest", wrong);
    }
    step.max_top = max_top, step.logits = nullptr;
    expect(smolora_sample(native.object.get(), &step, error) == kInvalid, "neither hidden states nor logits");
    std::vector<bf16> hidden = random_bf16(random, (size_t)(num_rows * base.sizes.hidden));
    step.hidden = hidden.data();
    SUCCEED(smolora_sample, native.object.get(), &step);
    check();
    step.logits = logits.data();
    expect(smolora_sample(native.object.get(), &step, error) == kInvalid, "hidden states and logits");
}
