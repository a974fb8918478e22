// Memory and threads that can't be had, each request in turn: the call fails, and nothing else. Teams are of three, so
// that one thread may have started when the next one can't.
#include <tuple>

#include "faults.h"
#include "tiny_base.h"

TEST(a_step_of_serving_without_memory) {
    Random random(1);
    const TinyBase base(random, 1);
    Step step(base, 4, 40);
    for (int i = 0; i < 4; i++) step.add(i, 0, 5 * i + 2, i + 1);
    ServeStep tables = step.tables();
    char error[kErrorSize];
    const Native native = Native::serving(base, 2);
    SUCCEED(smolora_forward, native.object.get(), &tables);
    const std::vector<bf16> expected = step.hidden;
    std::vector<float> logits((size_t)(tables.num_tokens * base.sizes.vocab));
    for (int failing : {1, 1000}) {
        fail_each_in_turn(failing, [&] {
            const Native fresh = Native::serving(base, 3);
            if (fresh.status != kOk) return fresh.status;
            const int status = smolora_forward(fresh.object.get(), &tables, error);
            if (status == kOk)
                return smolora_logits(fresh.object.get(), step.hidden.data(), tables.num_tokens, logits.data(), error);
            pause_failing();  // it is used on
            step.hidden.assign(step.hidden.size(), 0);
            if (smolora_forward(fresh.object.get(), &tables, error) != kOk || step.hidden != expected)
                return (int)kFailed;
            return status;
        });
        expect(step.hidden == expected, "a step that failed leaves something behind");
    }
}

TEST(a_sample_without_memory) {
    Random random(2);
    const TinyBase base(random, 1);
    const int64_t num_rows = 6, max_top = 5;
    const std::vector<bf16> hidden = random_bf16(random, (size_t)(num_rows * base.sizes.hidden));
    std::vector<SampleRow> rows;
    for (int64_t i = 0; i < num_rows; i++)
        rows.push_back({0.5 * (double)i, i % 2 ? 0.9 : 1.0, 0, i == 4 ? 9 : 0, i, max_top, nullptr, 1.2, 0, 3, 0, 0});
    const std::vector<int64_t> seen{3, 5, 8};
    std::vector<int64_t> token_ids(num_rows), top_ids(num_rows * max_top);
    std::vector<float> logprobs(num_rows * (1 + max_top));
    const SampleStep step{num_rows,      hidden.data(), nullptr, rows.data(), seen.data(),      3,
                          nullptr,       nullptr,       0,       max_top,     token_ids.data(), logprobs.data(),
                          top_ids.data()};
    char error[kErrorSize];
    const Native native = Native::serving(base, 2);
    SUCCEED(smolora_sample, native.object.get(), &step);
    const auto expected = std::tuple(token_ids, logprobs, top_ids);
    auto is_expected = [&] { return std::tuple(token_ids, logprobs, top_ids) == expected; };
    for (int failing : {1, 1000})
        fail_each_in_turn(failing, [&] {
            const Native fresh = Native::serving(base, 3);
            if (fresh.status != kOk) return fresh.status;
            token_ids.assign(num_rows, -2);
            const int status = smolora_sample(fresh.object.get(), &step, error);
            pause_failing();  // it is used on
            if (status == kOk) return is_expected() ? status : (int)kFailed;
            token_ids.assign(num_rows, -2);
            if (smolora_sample(fresh.object.get(), &step, error) != kOk || !is_expected()) return (int)kFailed;
            return status;
        });
}

TEST(a_step_of_training_without_memory) {
    Random random(1);
    const TinyBase base(random, 1);
    Texts texts(base, {5, 33, 20}, true);
    BaseGradients of_base(base);
    texts.d_weights = of_base.places();
    const TrainBatch batch = texts.batch();
    std::vector<bf16> d_hidden(texts.hidden.size());
    double loss;
    char error[kErrorSize];
    auto pass = [&](const Native& native) {
        int status = smolora_training_forward(native.object.get(), &batch, texts.hidden.data(), error);
        if (status == kOk)
            status = smolora_training_loss(native.object.get(), texts.hidden.data(), texts.token_ids.data(),
                                           batch.num_tokens, 1, d_hidden.data(), texts.d_weights.back(), &loss, error);
        if (status == kOk) status = smolora_training_backward(native.object.get(), d_hidden.data(), error);
        return status;
    };
    expect(pass(Native::training(base, 2)) == kOk, "it works");
    const auto expected = texts.gradients;
    const auto expected_of_base = of_base.values;
    for (int failing : {1, 1000})
        fail_each_in_turn(failing, [&] {
            const Native fresh = Native::training(base, 3);
            if (fresh.status != kOk) return fresh.status;
            const int status = pass(fresh);
            if (status == kOk) return status;
            pause_failing();  // it is used on
            std::fill(texts.gradients.begin(), texts.gradients.end(), 0);
            of_base.clear();
            if (pass(fresh) != kOk || texts.gradients != expected || of_base.values != expected_of_base)
                return (int)kFailed;
            return status;
        });
}
