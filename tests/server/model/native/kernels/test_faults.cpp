// Memory and threads that can't be had, each request in turn: the call fails, and nothing else. Teams are of three, so
// that one thread may have started when the next one can't.
#include "faults.h"
#include "tiny_base.h"

namespace {

// Runs `work` again and again, the next request failing each time (and `failing` from it on), until all succeed. It
// answers a status, and must end in kOk or kNoMemory.
template <class Work>
void fail_each_in_turn(int failing, Work work) {
    for (int k = 0;; k++) {
        fail_after(k, failing);
        const int status = work();
        const bool has_failed = fail_no_more();
        expect(k < 5000, "it never ends");
        expect(status == kOk || status == kNoMemory, "request %d: status %d", k, status);
        if (!has_failed) {
            expect(status == kOk && k > 20, "%d requests, status %d", k, status);
            return;
        }
        expect(status == kNoMemory, "request %d failed, and the call did not", k);
    }
}

}  // namespace

TEST(a_step_of_serving_without_memory) {
    Random random(1);
    const TinyBase base(random, 1);
    Step step(base, 4, 40);
    for (int i = 0; i < 4; i++) step.add(i, 0, 5 * i + 2);
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

TEST(a_step_of_training_without_memory) {
    Random random(1);
    const TinyBase base(random, 1);
    Texts texts(base, {5, 33, 20}, true);
    const TrainBatch batch = texts.batch();
    std::vector<bf16> d_hidden(texts.hidden.size());
    double loss;
    char error[kErrorSize];
    auto pass = [&](const Native& native) {
        int status = smolora_training_forward(native.object.get(), &batch, texts.hidden.data(), error);
        if (status == kOk)
            status = smolora_training_loss(native.object.get(), texts.hidden.data(), texts.token_ids.data(),
                                           batch.num_tokens, 1, d_hidden.data(), &loss, error);
        if (status == kOk) status = smolora_training_backward(native.object.get(), d_hidden.data(), error);
        return status;
    };
    expect(pass(Native::training(base, 2)) == kOk, "it works");
    const auto expected = texts.gradients;
    for (int failing : {1, 1000})
        fail_each_in_turn(failing, [&] {
            const Native fresh = Native::training(base, 3);
            if (fresh.status != kOk) return fresh.status;
            const int status = pass(fresh);
            if (status == kOk) return status;
            pause_failing();  // it is used on
            for (auto& gradient : texts.gradients) std::fill(gradient.begin(), gradient.end(), 0);
            if (pass(fresh) != kOk || texts.gradients != expected) return (int)kFailed;
            return status;
        });
}
