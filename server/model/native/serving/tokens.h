// The tokens of a step: whose they are, which attend together, and which of them are wanted in the end.
#pragma once
#include <algorithm>
#include <vector>

#include "seam/abi.h"

struct Query {  // tokens [start, stop), of one sequence, from `position` on in it
    int start, stop, position;
    const int32_t* blocks;

    int length() const { return position + stop - start; }  // positions that its last token sees
};

class StepTokens {
  public:
    // All of a step's. A query has `most` tokens at most.
    void plan(const ServeStep& step, int most) {
        most_ = most, count_ = (int)step.num_tokens, num_wanted_ = 0;
        positions_.resize(count_);
        tables_.resize(count_);
        queries_.clear();
        for (int64_t i = 0; i < step.num_runs; i++) {
            const ServeRun& run = step.runs[i];
            const int32_t* blocks = step.blocks + run.first_block;
            for (int64_t t = run.start; t < run.stop; t++) {
                positions_[t] = (int)(run.position + t - run.start);
                tables_[t] = blocks;
            }
            add_queries((int)run.start, (int)(run.stop - run.start), (int)run.position, blocks);
            num_wanted_ += (int)run.num_wanted;
        }
        sort_queries();
    }

    // From here on they are those whose hidden states are wanted, one run's behind the other's; `position` and `blocks`
    // don't follow. Calls move(from, to, count) for neighbours, each of which moves to a place that is free by then.
    template <class Move>
    void keep_wanted(const ServeStep& step, Move move) {
        queries_.clear();
        count_ = 0;
        for (int64_t i = 0; i < step.num_runs; i++) {
            const ServeRun& run = step.runs[i];
            const int wanted = (int)run.num_wanted, first = (int)run.stop - wanted;
            move(first, count_, wanted);
            add_queries(count_, wanted, (int)(run.position + first - run.start), step.blocks + run.first_block);
            count_ += wanted;
        }
        sort_queries();
    }

    int count() const { return count_; }
    int num_wanted() const { return num_wanted_; }
    int position(int token) const { return positions_[token]; }
    const int32_t* blocks(int token) const { return tables_[token]; }
    // Those that see the most come last.
    const std::vector<Query>& queries() const { return queries_; }

  private:
    void add_queries(int start, int count, int position, const int32_t* blocks) {
        for (int t = 0; t < count; t += most_)
            queries_.push_back({start + t, start + std::min(t + most_, count), position + t, blocks});
    }
    void sort_queries() {
        std::sort(queries_.begin(), queries_.end(),
                  [](const Query& one, const Query& other) { return one.length() < other.length(); });
    }

    int most_ = 1, count_ = 0, num_wanted_ = 0;
    std::vector<int> positions_;
    std::vector<const int32_t*> tables_;
    std::vector<Query> queries_;
};
