// A whole step in one call: what `smolora_draw` chooses is what a forward pass and a choice behind it do.
#include "faults.h"
#include "tiny_base.h"

namespace {

// How so many rows are chosen, in many ways, and where the answer comes.
struct Drawing {
    static constexpr int64_t kMaxTop = 3;
    std::vector<SampleRow> rows;
    std::vector<int64_t> seen{3, 5, 8}, token_ids, top_ids;
    std::vector<float> logprobs;

    explicit Drawing(int64_t num_rows)
        : token_ids((size_t)num_rows), top_ids((size_t)(num_rows * kMaxTop)), logprobs(num_rows * (1 + kMaxTop)) {
        for (int64_t i = 0; i < num_rows; i++)
            rows.push_back({0.5 * (double)(i % 3), i % 2 ? 0.9 : 1.0, 0, i == 4 ? 9 : 0, i, i % 2 ? kMaxTop : 0,
                            nullptr, 1.2, 0, 3, 0, 0});
    }
    SampleStep step(const bf16* hidden = nullptr) {
        std::fill(token_ids.begin(), token_ids.end(), -2);
        return {(int64_t)rows.size(),
                hidden,
                nullptr,
                rows.data(),
                seen.data(),
                3,
                nullptr,
                nullptr,
                0,
                kMaxTop,
                token_ids.data(),
                logprobs.data(),
                top_ids.data()};
    }
    auto found() const { return std::tuple(token_ids, logprobs, top_ids); }
};

// A prompt of which two tokens are wanted, one of which none is, and two that decode.
Step uneven(const TinyBase& base) {
    Step step(base, 4, base.sizes.max_positions);
    step.add(0, 0, 40, 2), step.add(1, 0, 33, 0), step.add(2, 0, 1), step.add(3, 0, 1);
    return step;
}

}  // namespace

TEST(one_call_chooses_what_two_do) {
    Random random(1);
    const TinyBase base(random);
    for (int threads : {1, 2, 3}) {
        const Native native = Native::serving(base, threads);
        Step step = uneven(base);
        ServeStep tables = step.tables();
        SUCCEED(smolora_forward, native.object.get(), &tables);
        Drawing apart(4), together(4);
        const SampleStep behind = apart.step(step.hidden.data());
        SUCCEED(smolora_sample, native.object.get(), &behind);
        tables.hidden = nullptr;  // they stay inside
        const SampleStep sampling = together.step();
        SUCCEED(smolora_draw, native.object.get(), &tables, &sampling);
        expect(together.found() == apart.found(), "with %d threads", threads);
    }
}

TEST(a_step_that_draws_nothing) {
    Random random(1);
    const TinyBase base(random);
    const Native native = Native::serving(base, 2);
    Step step(base, 2, base.sizes.max_positions);
    step.add(1, 0, 33, 0);
    const ServeStep tables = step.tables();
    Drawing none(0);
    const SampleStep sampling = none.step();
    SUCCEED(smolora_draw, native.object.get(), &tables, &sampling);
}

TEST(rows_that_do_not_fit_the_step) {
    Random random(1);
    const TinyBase base(random);
    const Native native = Native::serving(base, 2);
    Step step = uneven(base);
    const ServeStep tables = step.tables();
    std::vector<float> logits((size_t)(4 * base.sizes.vocab));
    char error[kErrorSize] = "";
    for (int64_t num_rows : {0, 3, 5}) {
        Drawing drawing(num_rows);
        const SampleStep sampling = drawing.step();
        expect(smolora_draw(native.object.get(), &tables, &sampling, error) == kInvalid, "%ld rows", num_rows);
    }
    Drawing drawing(4);
    SampleStep sampling = drawing.step(step.hidden.data());
    expect(smolora_draw(native.object.get(), &tables, &sampling, error) == kInvalid, "with hidden states");
    sampling = drawing.step(), sampling.logits = logits.data();
    expect(smolora_draw(native.object.get(), &tables, &sampling, error) == kInvalid, "with logits");
    sampling.logits = nullptr, drawing.rows[2].num_top = Drawing::kMaxTop + 1;
    expect(smolora_draw(native.object.get(), &tables, &sampling, error) == kInvalid, "more likeliest tokens than room");
    drawing.rows[2].num_top = 0;
    SUCCEED(smolora_draw, native.object.get(), &tables, &sampling);
}

TEST(a_step_in_one_call_without_memory) {
    Random random(1);
    const TinyBase base(random, 1);
    Step step = uneven(base);
    const ServeStep tables = step.tables();
    Drawing drawing(4);
    const SampleStep sampling = drawing.step();
    char error[kErrorSize];
    const Native native = Native::serving(base, 2);
    SUCCEED(smolora_draw, native.object.get(), &tables, &sampling);
    const auto expected = drawing.found();
    for (int failing : {1, 1000})
        fail_each_in_turn(failing, [&] {
            const Native fresh = Native::serving(base, 3);
            if (fresh.status != kOk) return fresh.status;
            drawing.step();
            const int status = smolora_draw(fresh.object.get(), &tables, &sampling, error);
            pause_failing();  // it is used on
            if (status == kOk) return drawing.found() == expected ? status : (int)kFailed;
            drawing.step();
            if (smolora_draw(fresh.object.get(), &tables, &sampling, error) != kOk || drawing.found() != expected)
                return (int)kFailed;
            return status;
        });
}
