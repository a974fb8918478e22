// Measures the phases of steps by the calling thread's clock: its own items, and its waits for the other threads.
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
    // Returns each phase's nanoseconds since the last call, and turns the clock on or off.
    std::array<int64_t, count> take(bool is_on) {
        is_on_ = is_on;
        return std::exchange(spent_, {});
    }
    void begin() {
        if (is_on_) last_ = Clock::now();
    }
    // Counts the time since `begin`, or since the previous phase's end, for this phase. All threads of a team may call
    // it, except for a job's last phase, which ends after the job.
    void end(Phase phase) {
        if (!is_on_ || Team::number() != 0) return;
        const Clock::time_point now = Clock::now();
        spent_[phase] += std::chrono::nanoseconds(now - last_).count();
        last_ = now;
    }

  private:
    using Clock = std::chrono::steady_clock;
    bool is_on_ = false;  // changes only between steps
    Clock::time_point last_;
    std::array<int64_t, count> spent_{};
};
