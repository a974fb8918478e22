// How long the phases of steps take, as the thread that calls sees them: its own items and the wait for the others'.
// `Phase` is an enum of `count` phases, in order.
#pragma once
#include <array>
#include <chrono>
#include <utility>

#include "seam/abi.h"
#include "team.h"

template <class Phase, int count>
class PhaseClock {
  public:
    // The nanoseconds of each phase since the last time that this was called; from now on they are counted, or not.
    std::array<int64_t, count> take(bool is_on) {
        is_on_ = is_on;
        return std::exchange(spent_, {});
    }
    void begin() {
        if (is_on_) last_ = Clock::now();
    }
    // What was done since `begin`, or since the phase before ended, was of this phase. All of a team may call it,
    // but for a job's last phase, which ends behind the job.
    void end(Phase phase) {
        if (!is_on_ || Team::number() != 0) return;
        const Clock::time_point now = Clock::now();
        spent_[phase] += std::chrono::nanoseconds(now - last_).count();
        last_ = now;
    }

  private:
    using Clock = std::chrono::steady_clock;
    bool is_on_ = false;  // changes between steps alone
    Clock::time_point last_;
    std::array<int64_t, count> spent_{};
};
