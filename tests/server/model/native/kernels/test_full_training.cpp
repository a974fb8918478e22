// Steps that train the base itself, by way of the library's entries.
#include "tiny_base.h"

namespace {

// Its loss and the gradients of all tensors.
double accumulate(const Native& native, Texts& texts, std::vector<bf16>& hidden) {
    const TrainBatch batch = texts.batch();
    std::vector<bf16> d_hidden(hidden.size());
    double loss = 0;
    SUCCEED(smolora_training_forward, native.object.get(), &batch, hidden.data());
    SUCCEED(smolora_training_loss, native.object.get(), hidden.data(), texts.token_ids.data(), batch.num_tokens, 1.0,
            d_hidden.data(), texts.d_weights.back(), &loss);
    SUCCEED(smolora_training_backward, native.object.get(), d_hidden.data());
    return loss;
}

}  // namespace

// As far as 16 bits tell; the embedding and the head are two tensors here.
TEST(gradients_of_the_base_are_slopes) {
    Random random(2);
    TinyBase base(random);
    const Native native = Native::training(base, 2);
    Texts texts(base, {21, 9}, false);
    BaseGradients gradients(base), others(base);
    texts.d_weights = gradients.places();
    accumulate(native, texts, texts.hidden);
    texts.d_weights = others.places();
    for (size_t i = 0; i < base.tensors.size(); i++) {
        auto& weights = base.tensors[i];
        const std::vector<bf16> before = weights;
        const std::vector<float>& gradient = gradients.values[i];
        double norm = 0, size = 0;
        for (float of : gradient) norm += (double)of * of;
        for (bf16 of : weights) size += to_float(of) * to_float(of);
        expect(norm > 0, "tensor %zu has no gradient", i);
        // So far that rounding is small beside it, but no curve: a matrix has more numbers to add up than a norm.
        const bool is_norm = (int64_t)weights.size() == base.sizes.hidden;
        const double by = (is_norm ? 0.03 : 0.003) * std::sqrt(size / norm);
        double slope[2], moved[2] = {0, 0};
        for (int side : {0, 1}) {
            for (size_t k = 0; k < weights.size(); k++) {
                const float x = to_float(before[k]);
                weights[k] = to_bf16((float)(x + (side ? by : -by) * gradient[k]));
                moved[side] += (to_float(weights[k]) - x) * (double)gradient[k];
            }
            slope[side] = accumulate(native, texts, texts.hidden);
        }
        weights = before;
        expect_near((slope[1] - slope[0]) / (moved[1] - moved[0]), 1, 0.03, "tensor %zu", i);
    }
}

// One batch after the other: the same whatever the number of threads, and added to what was there.
TEST(gradients_of_the_base_are_added_up) {
    Random random(3);
    const TinyBase base(random);
    Texts large(base, {33, 5, 1, 70}, false), small(base, {9}, false);
    auto gradients_of = [&](int threads, const std::vector<Texts*>& all) {
        const Native native = Native::training(base, threads);
        BaseGradients gradients(base);
        for (Texts* texts : all) {
            texts->d_weights = gradients.places();
            accumulate(native, *texts, texts->hidden);
        }
        return gradients.values;
    };
    const auto both = gradients_of(1, {&large, &small}), first = gradients_of(1, {&large});
    const auto second = gradients_of(1, {&small});
    for (int threads : {2, 3, 7}) expect(gradients_of(threads, {&large, &small}) == both, "%d threads differ", threads);
    for (size_t i = 0; i < both.size(); i++)
        for (size_t k = 0; k < both[i].size(); k++) {
            const double sum = (double)first[i][k] + second[i][k];
            const double size = std::abs(first[i][k]) + std::abs(second[i][k]);
            expect_near(both[i][k], sum, 1e-4 * (1 + size), "tensor %zu, number %zu", i, k);
        }
}

TEST(gradients_without_a_place_are_refused) {
    Random random(4);
    const TinyBase base(random);
    const Native native = Native::training(base, 1);
    Texts texts(base, {4}, false);
    BaseGradients gradients(base);
    char error[kErrorSize];
    for (size_t i = 0; i < base.tensors.size(); i++) {
        texts.d_weights = gradients.places();
        texts.d_weights[i] = nullptr;
        const TrainBatch batch = texts.batch();
        expect(smolora_training_forward(native.object.get(), &batch, texts.hidden.data(), error) == kInvalid,
               "tensor %zu is taken", i);
    }
}
