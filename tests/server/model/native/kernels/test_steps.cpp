// Whole steps of serving and training, by way of the library's entries.
#include "tiny_base.h"

namespace {

void check_finite(const std::vector<bf16>& x, const char* what) {
    for (bf16 of : x) expect(std::isfinite(to_float(of)), "%s: %g", what, to_float(of));
}

// The final hidden states of each sequence's last step: prompts in pieces, then a token at a time.
std::vector<std::vector<bf16>> serve(const TinyBase& base, int threads, const std::vector<int>& sequences) {
    const Native native = Native::serving(base, threads);
    expect(native.status == kOk, "it can't be created");
    Step step(base, 8, base.sizes.max_positions);
    const std::vector<std::vector<int64_t>> cuts = {{37, 38}, {50, 70, 71}, {1, 2, 3, 4}, {33, 80}};
    std::vector<std::vector<bf16>> found(sequences.size());
    for (size_t round = 0; round < 4; round++) {
        step.clear();
        std::vector<size_t> active;
        for (size_t i = 0; i < sequences.size(); i++) {
            const auto& cut = cuts[sequences[i] % 4];
            if (round >= cut.size()) continue;
            step.add(sequences[i], round ? cut[round - 1] : 0, cut[round]);
            active.push_back(i);
        }
        if (active.empty()) break;
        ServeStep tables = step.tables();
        tables.num_threads = (int64_t)round % (threads + 1);  // 0: all
        SUCCEED(smolora_forward, native.object.get(), &tables);
        check_finite(step.hidden, "hidden states");
        for (size_t i = 0; i < active.size(); i++)
            found[active[i]].assign(step.hidden.begin() + step.runs[i].start * base.sizes.hidden,
                                    step.hidden.begin() + step.runs[i].stop * base.sizes.hidden);
        const int64_t rows = tables.num_tokens;
        std::vector<float> logits((size_t)(rows * base.sizes.vocab));
        SUCCEED(smolora_logits, native.object.get(), step.hidden.data(), rows, logits.data());
        for (float of : logits) expect(std::isfinite(of), "a logit is %g", of);
    }
    return found;
}

struct Pass {
    std::vector<bf16> hidden;
    double loss;
    std::vector<float> gradients;
    bool operator==(const Pass& other) const = default;
};

Pass train(const TinyBase& base, int threads, bool has_dropout) {
    const Native native = Native::training(base, threads);
    expect(native.status == kOk, "it can't be created");
    Pass pass;
    for (const std::vector<int64_t>& lengths : {std::vector<int64_t>{5, 1, 33, 32, 80}, {3}, {17, 48}}) {
        Texts texts(base, lengths, has_dropout);
        const TrainBatch batch = texts.batch();
        SUCCEED(smolora_training_forward, native.object.get(), &batch, texts.hidden.data());
        check_finite(texts.hidden, "hidden states");
        std::vector<bf16> d_hidden(texts.hidden.size());
        SUCCEED(smolora_training_loss, native.object.get(), texts.hidden.data(), texts.token_ids.data(),
                batch.num_tokens, 1.0 / (double)batch.num_tokens, d_hidden.data(), nullptr, &pass.loss);
        SUCCEED(smolora_training_backward, native.object.get(), d_hidden.data());
        pass.hidden = texts.hidden, pass.gradients = texts.gradients;
        for (size_t i = 0; i < texts.weights.size(); i++) {
            const auto gradient = texts.gradient(base, i);
            double size = 0;
            for (float of : gradient) size += std::abs(of);
            expect(gradient.empty() || (std::isfinite(size) && size > 0), "a gradient of size %g", size);
        }
    }
    return pass;
}

}  // namespace

TEST(steps_of_serving) {
    Random random(1);
    const TinyBase base(random);
    const auto together = serve(base, 1, {0, 1, 2, 3, 5, 7});
    expect(serve(base, 3, {0, 1, 2, 3, 5, 7}) == together, "threads change something");
    const auto alone = serve(base, 2, {1});
    expect(alone[0] == together[1], "company changes something");
    expect(together[1] != together[3], "adapters do something");
}

TEST(steps_over_stored_weights) {
    Random random(3);
    TinyBase base(random);
    base.store_in_blocks(random);
    const std::vector<int> sequences = {0, 1, 2, 3, 5, 7};
    const auto found = serve(base, 1, sequences);
    expect(serve(base, 3, sequences) == found, "threads change something");
    expect(serve(base, 2, {1})[0] == found[1], "company changes something");
    for (BaseTensor& tensor : base.table) tensor.type = kBf16, tensor.blocks = nullptr;
    expect(serve(base, 2, sequences) == found, "they aren't the expanded weights' steps");
}

TEST(weights_of_no_known_type) {
    Random random(3);
    TinyBase base(random);
    base.table[2].type = 3;
    expect(Native::serving(base, 1).status == kInvalid, "type 3 is taken");
    base.table[2].type = kQ4_1;
    expect(Native::serving(base, 1).status == kInvalid, "blocks that aren't there are taken");
}

TEST(steps_of_training) {
    Random random(1);
    const TinyBase base(random);
    for (bool has_dropout : {false, true}) {
        const Pass pass = train(base, 1, has_dropout);
        expect(train(base, 3, has_dropout) == pass, "threads change something");
        expect(pass.loss > 0 && std::isfinite(pass.loss), "a loss of %g", pass.loss);
    }
}

// The gradients of a few numbers of A and B are the slopes of the loss in them, as far as 16 bits tell.
TEST(gradients_are_slopes) {
    Random random(2);
    const TinyBase base(random);
    const Native native = Native::training(base, 2);
    Texts texts(base, {21, 9}, false);
    const TrainBatch batch = texts.batch();
    std::vector<bf16> d_hidden(texts.hidden.size());
    double loss = 0;
    auto forward = [&] {
        SUCCEED(smolora_training_forward, native.object.get(), &batch, texts.hidden.data());
        SUCCEED(smolora_training_loss, native.object.get(), texts.hidden.data(), texts.token_ids.data(),
                batch.num_tokens, 1.0, d_hidden.data(), nullptr, &loss);
    };
    forward();
    SUCCEED(smolora_training_backward, native.object.get(), d_hidden.data());
    // Along the gradient of each matrix, far enough that rounding is small beside it.
    for (size_t i = 0; i < texts.weights.size(); i++) {
        auto& weights = texts.weights[i];
        if (weights.empty()) continue;
        const std::vector<bf16> before = weights;
        const std::vector<float> gradient = texts.gradient(base, i);
        double norm = 0, size = 0;
        for (float of : gradient) norm += (double)of * of;
        for (bf16 of : weights) size += to_float(of) * to_float(of);
        const double by = 0.01 * std::sqrt(size / norm);
        double slope[2], moved[2] = {0, 0};
        for (int side : {0, 1}) {
            for (size_t k = 0; k < weights.size(); k++) {
                const float x = to_float(before[k]);
                if (gradient[k] != 0) weights[k] = to_bf16((float)(x + (side ? by : -by) * gradient[k]));
                moved[side] += (to_float(weights[k]) - x) * (double)gradient[k];
            }
            forward();
            slope[side] = loss;
        }
        weights = before;
        expect_near((slope[1] - slope[0]) / (moved[1] - moved[0]), 1, 0.03, "matrix %zu of group %zu", i % 2, i / 2);
    }
}

// Whatever stands in the tables, a call is refused or reads and writes where it may: sanitizers would tell.
TEST(tables_of_any_numbers) {
    Random random(3);
    const TinyBase base(random);
    const Native serving = Native::serving(base, 1), training = Native::training(base, 1);
    Step step(base, 4, 40);
    for (int i = 0; i < 4; i++) step.add(i, i ? 3 * i : 0, 5 * i + 9);
    step.tables();
    Texts texts(base, {5, 1, 33}, false);
    std::vector<int64_t> targets = texts.token_ids;
    std::vector<bf16> d_hidden(texts.hidden.size());

    std::vector<int64_t*> numbers;
    auto add = [&](auto& structs) {
        for (auto& of : structs)
            for (size_t i = 0; i < sizeof of / 8; i++) numbers.push_back((int64_t*)&of + i);
    };
    add(step.token_ids), add(step.runs), add(step.segments), add(step.modules);
    for (auto& parts : step.parts) add(parts);
    for (auto& pool : step.pools) numbers.push_back(&pool.in), numbers.push_back(&pool.layers);
    const size_t of_serving = numbers.size();
    add(texts.token_ids), add(texts.starts), add(targets);
    for (auto& modules : texts.modules) add(modules);

    int num_refused = 0, num_done = 0;
    for (int round = 0; round < 3000; round++) {
        const size_t chosen = (size_t)random.below((int64_t)numbers.size());
        int64_t& number = *numbers[chosen];
        const int64_t before = number;
        const int64_t others[] = {-1,         before + 1,         before - 1,       before + 16,      before - 32, 0,
                                  before * 2, 1ll << 31,          1ll << 40,        INT64_MAX,        INT64_MIN,   16,
                                  1ll << 62,  INT64_MAX - before, base.sizes.vocab, random.below(100)};
        number = others[random.below(std::size(others))];
        char error[kErrorSize] = "";
        int status;
        if (chosen < of_serving) {
            const ServeStep tables = step.tables();
            status = smolora_forward(serving.object.get(), &tables, error);
        } else {
            const TrainBatch batch = texts.batch();
            double loss;
            status = smolora_training_forward(training.object.get(), &batch, texts.hidden.data(), error);
            if (status == kOk)
                status = smolora_training_loss(training.object.get(), texts.hidden.data(), targets.data(),
                                               batch.num_tokens, 1, d_hidden.data(), nullptr, &loss, error);
            if (status == kOk) status = smolora_training_backward(training.object.get(), d_hidden.data(), error);
        }
        expect(status == kOk || (status == kInvalid && *error), "number %zu of %ld: status %d, %s", chosen, number,
               status, error);
        (status == kOk ? num_done : num_refused)++;
        number = before;
    }
    expect(num_refused > 500 && num_done > 100, "%d were refused, %d done", num_refused, num_done);
    std::vector<int32_t> blocks = step.blocks;
    for (int32_t& block : step.blocks)
        for (int32_t other : {-1, INT32_MIN, INT32_MAX, (int32_t)step.num_blocks}) {
            const int32_t before = block;
            block = other;
            char error[kErrorSize] = "";
            const ServeStep tables = step.tables();
            expect(smolora_forward(serving.object.get(), &tables, error) == kInvalid, "block %d is taken", other);
            block = before;
        }
    expect(blocks == step.blocks, "the tables are as they were");
    const ServeStep tables = step.tables();
    SUCCEED(smolora_forward, serving.object.get(), &tables);
}

TEST(sizes_that_are_not_covered) {
    Random random(4);
    const TinyBase base(random);
    for (int64_t BaseSizes::* field :
         {&BaseSizes::vocab, &BaseSizes::hidden, &BaseSizes::intermediate, &BaseSizes::head_dim, &BaseSizes::heads,
          &BaseSizes::kv_heads, &BaseSizes::layers, &BaseSizes::max_positions, &BaseSizes::threads})
        for (int64_t wrong : {-32, 0}) {
            BaseSizes sizes = base.sizes;
            sizes.*field = wrong;
            char error[kErrorSize] = "";
            void* created = nullptr;
            for (auto create : {smolora_create, smolora_training_create}) {
                expect(create(&sizes, base.table.data(), base.rotary.data(), base.uses_rotary.data(), &created,
                              error) == kInvalid,
                       "%ld is taken", wrong);
                expect(created == nullptr && *error, "nothing is created");
            }
        }
}

// Hidden states and losses without a backward pass: the same, by layers that share their buffers.
TEST(measuring_is_training_without_gradients) {
    Random random(6);
    const TinyBase base(random);
    const Native native = Native::training(base, 2);
    double loss;
    char error[kErrorSize];
    for (const std::vector<int64_t>& lengths : {std::vector<int64_t>{5, 33}, {48, 80, 1}, {3}}) {
        Texts texts(base, lengths, false);
        const TrainBatch batch = texts.batch(), measured = texts.batch(false);
        const std::vector<int64_t>& targets = texts.token_ids;
        SUCCEED(smolora_training_forward, native.object.get(), &batch, texts.hidden.data());
        const std::vector<bf16> expected = texts.hidden;
        std::vector<bf16> d_hidden(expected.size());
        SUCCEED(smolora_training_loss, native.object.get(), texts.hidden.data(), targets.data(), batch.num_tokens, 1.0,
                d_hidden.data(), nullptr, &loss);
        std::fill(texts.hidden.begin(), texts.hidden.end(), 0);
        SUCCEED(smolora_training_forward, native.object.get(), &measured, texts.hidden.data());
        expect(texts.hidden == expected, "other hidden states");
        std::vector<double> losses(targets.size());
        std::vector<int64_t> likeliest(targets.size());
        SUCCEED(smolora_training_measure, native.object.get(), texts.hidden.data(), targets.data(), batch.num_tokens,
                losses.data(), likeliest.data());
        for (double of : losses) loss -= of;
        expect_near(loss, 0, 1e-9, "the losses' sum");
        expect(smolora_training_backward(native.object.get(), texts.hidden.data(), error) == kInvalid,
               "nothing is kept for a backward pass");
    }
    const int64_t outside[] = {0, base.sizes.vocab};
    std::vector<double> losses(2);
    std::vector<int64_t> likeliest(2);
    const std::vector<bf16> hidden((size_t)(2 * base.sizes.hidden));
    for (int64_t rows : {(int64_t)2, (int64_t)-1})
        expect(smolora_training_measure(native.object.get(), hidden.data(), outside, rows, losses.data(),
                                        likeliest.data(), error) == kInvalid,
               "it is refused");
}

TEST(a_backward_pass_after_a_forward_pass) {
    Random random(5);
    const TinyBase base(random);
    const Native native = Native::training(base, 1);
    Texts texts(base, {4}, false);
    const TrainBatch batch = texts.batch();
    char error[kErrorSize];
    auto backward = [&] { return smolora_training_backward(native.object.get(), texts.hidden.data(), error); };
    expect(backward() == kInvalid, "there was no forward pass");
    SUCCEED(smolora_training_forward, native.object.get(), &batch, texts.hidden.data());
    expect(backward() == kOk && backward() == kInvalid, "it runs once");
    SUCCEED(smolora_training_forward, native.object.get(), &batch, texts.hidden.data());
    texts.token_ids[0] = -1;
    expect(smolora_training_forward(native.object.get(), &batch, texts.hidden.data(), error) == kInvalid,
           "-1 is taken");
    expect(backward() == kInvalid, "a batch that was refused has no backward pass");
}
