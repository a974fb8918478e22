// What follows the layers: logits, and tokens that are chosen by them. All calls are of a whole team, in a job.
#pragma once
#include "base.h"
#include "kernels/phases.h"
#include "kernels/sampling.h"

namespace {

struct alignas(64) HeadScratch {  // of one thread
    ExpandedTile tile;
    PrefetchList prefetch;  // empty
    WideRows wide;          // of the hidden states
    RowSampler sampler;
};

class Head {
  public:
    // All are kept.
    Head(const BaseSizes& sizes, const Matrix& lm_head, Team& team, PhaseClock<Phase, kPhases>& clock)
        : s_(sizes), lm_head_(lm_head), team_(team), clock_(clock), scratch_(sizes.threads) {}

    // logits (rows, vocab) of hidden (rows, hidden).
    void project(const bf16* hidden, int rows, float* logits) {
        const int tiles = (int)(s_.vocab / kTile);
        scratch_[Team::number()].wide.begin(tiles / team_.active());
        team_.each(tiles, [&](int tile) {
            HeadScratch& own = scratch_[Team::number()];
            lm_head_.multiply(own.wide.rows(hidden, s_.hidden, 0, rows), rows, tile, logits + tile * kTile, s_.vocab,
                              own.tile, own.prefetch);
        });
    }

    // The next token of each row: `logits` are given, or those of the hidden states that are.
    void choose(const SampleStep& step, float* logits) {
        if (step.hidden) project(step.hidden, (int)step.num_rows, logits);
        clock_.end(kHeadPhase);
        team_.each((int)step.num_rows, [&](int row) {
            scratch_[Team::number()].sampler.run(step, step.rows[row], logits + row * s_.vocab, s_.vocab,
                                                 step.token_ids + row, step.logprobs + row * (1 + step.max_top),
                                                 step.top_ids + row * step.max_top);
        });
    }

  private:
    const BaseSizes& s_;
    const Matrix& lm_head_;
    Team& team_;
    PhaseClock<Phase, kPhases>& clock_;
    std::vector<HeadScratch> scratch_;
};

}  // namespace
