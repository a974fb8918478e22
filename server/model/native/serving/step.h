// The SmolLM forward, from token ids to final hidden states and from those to logits or the next tokens, for CPUs with
// AVX2 or AVX-512, and for 64-bit Arm.
#pragma once
#include "head.h"
#include "layers.h"
#include "seam/checks.h"

namespace {

class Model {
  public:
    Model(const BaseSizes& sizes, const BaseTensor* tensors, const float* rotary, const uint8_t* uses_rotary)
        : s_(sizes),
          team_((int)sizes.threads),
          base_(sizes, tensors, uses_rotary, team_),
          layers_(s_, rotary, base_, team_, clock_),
          head_(s_, base_.lm_head, team_, clock_) {}

    // The final hidden states of the tokens that are wanted.
    void forward(const ServeStep& step) {
        prepare(step);
        layers_.run(step, [&] { layers_.final_norm(step.hidden); });
        clock_.end(kNormPhase);
    }

    // The next token behind each token that is wanted, whose hidden states stay here.
    void draw(const ServeStep& step, SampleStep sampling) {
        prepare(step);
        const int64_t rows = layers_.num_wanted();
        if (sampling.num_rows != rows) refuse("%ld rows for %ld hidden states", sampling.num_rows, rows);
        if (sampling.hidden != nullptr) refuse("hidden states of another step");
        bf16* hidden = room(hidden_, rows * s_.hidden);
        sampling.hidden = hidden;
        check_sampling(s_, sampling);
        float* logits = room(logits_, rows * s_.vocab);
        layers_.run(step, [&] {
            layers_.final_norm(hidden);
            clock_.end(kNormPhase);
            head_.choose(sampling, logits);
        });
        clock_.end(kSamplingPhase);
    }

    // logits (rows, vocab) of hidden (rows, hidden).
    void project(const bf16* hidden, int64_t rows, float* logits) {
        if (rows < 0 || rows > kMaxTokens) refuse("%ld rows", rows);
        clock_.begin();
        team_.run([&] { head_.project(hidden, (int)rows, logits); });
        clock_.end(kHeadPhase);
    }

    // The next token of each row of hidden states, or of logits.
    void sample(const SampleStep& step) {
        clock_.begin();
        check_sampling(s_, step);
        float* logits = step.logits ? step.logits : room(logits_, step.num_rows * s_.vocab);
        team_.run([&] { head_.choose(step, logits); });
        clock_.end(kSamplingPhase);
    }

    PhaseClock<Phase, kPhases>& clock() { return clock_; }

  private:
    void prepare(const ServeStep& step) {
        clock_.begin();
        check_step(s_, step);
        team_.set_active((int)(step.num_threads ? step.num_threads : s_.threads));
        layers_.prepare(step);
    }

    const BaseSizes s_;
    Team team_;
    const ServeBase base_;
    PhaseClock<Phase, kPhases> clock_;
    Layers layers_;
    Head head_;

    std::vector<float> logits_;
    std::vector<bf16> hidden_;
};

}  // namespace
