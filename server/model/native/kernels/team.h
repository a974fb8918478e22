// A team of threads that run the phases of a job together. All of them, or only the first few, take part in a job.
//
// In a phase each thread first computes its own items, which are neighbours, and then takes over items of the others:
// a thread that the system preempts delays the others by one item only. An item's result doesn't depend on its thread.
//
// If two threads of a team share a processor, each phase takes twice as long. Linux doesn't move them, since it moves
// no thread that has just run. So a thread that waits for another one on its own processor moves itself.
//
// A waiting thread spins at first, since waking up takes longer than most phases. Then it sleeps: the awaited thread or
// another process may need the processor, and spinning counts towards a container's quota.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "simd/simd.h"

class Team {
  public:
    // Throws std::system_error if a thread can't be started, and std::bad_alloc.
    explicit Team(int size) : size_(size), active_(size), jobs_(size), next_(size), processors_(size) {
        for (Counter& processor : processors_) processor.value = -1;
        try {
            for (int i = 1; i < size; i++) threads_.emplace_back([this, i] { work(i); });
        } catch (...) {
            end();
            throw;
        }
    }
    ~Team() { end(); }

    int size() const { return size_; }
    // The number of threads that take part in a job. The others sleep.
    int active() const { return active_; }
    // Takes effect at the next job; 1 to `size`. Must not be called within a job.
    void set_active(int active) {
        active_ = active;
        for (int i = active; i < size_; i++) processors_[i].value.store(-1, std::memory_order_relaxed);
    }
    // This thread's number within a job: 0 for the caller of `run`, up to active - 1.
    static int number() { return number_; }

    // Calls the job in every active thread, and returns when all phases are done. Every thread must run the same
    // phases, at least one, and nothing may follow the last phase. Once an item throws, the remaining items are
    // skipped, and the first exception is rethrown here. Only items may throw.
    void run(const std::function<void()>& job) {
        job_ = &job;
        has_failed_.store(false, std::memory_order_relaxed);
        wake(active_);
        number_ = 0;
        note_processor();
        job();
        if (has_failed_.load(std::memory_order_relaxed)) std::rethrow_exception(std::exchange(failure_, nullptr));
    }

    // Runs a phase: item(i) for each i below count, spread over the team. Returns when all are done.
    template <class Item>
    void each(int count, Item item) {
        attempt([&] { take(count, item); });
        barrier();
    }

    // Runs a phase in two parts: item(i), for i below count, may begin before all first(i) are done, and calls
    // wait_first before it needs them.
    template <class First, class Item>
    void each(int num_first, First first, int count, Item item) {
        attempt([&] {
            for (int i; goes_on() && (i = next_first_.fetch_add(1, std::memory_order_relaxed)) < num_first;) {
                first(i);
                if (done_.fetch_add(1) == num_first - 1) wake_sleepers(done_);
            }
            take(count, item);
        });
        barrier();
    }
    void wait_first(int num_first) {
        wait(done_, [=](int done) { return done >= num_first; });
        if (!goes_on()) throw Abandoned();
    }

  private:
    struct Abandoned {};  // ends an item that waits for a failed one
    struct alignas(64) Counter {
        std::atomic<int> value{0};
    };
    struct alignas(64) Jobs {
        std::atomic<unsigned> value{0};
    };
    bool goes_on() const { return !has_failed_.load(std::memory_order_relaxed); }
    // Keeps the job's first failure for `run`, which reads it after the phase's barrier.
    template <class Items>
    void attempt(Items items) noexcept {
        try {
            items();
        } catch (...) {
            if (has_failed_.exchange(true)) return;
            failure_ = std::current_exception();
            done_.fetch_add(kAllDone);  // releases the items that wait for skipped ones
            wake_sleepers(done_);
        }
    }
    template <class Item>
    void take(int count, Item& item) {
        for (int i = 0; i < active_; i++) {
            const int owner = (number_ + i) % active_;
            const int end = static_cast<int>(static_cast<int64_t>(count) * (owner + 1) / active_);
            const int begin = static_cast<int>(static_cast<int64_t>(count) * owner / active_);
            for (int k; goes_on() && (k = begin + next_[owner].value.fetch_add(1, std::memory_order_relaxed)) < end;)
                item(k);
        }
    }
    void work(int number) noexcept {
        number_ = number;
        std::atomic<unsigned>& jobs = jobs_[number].value;
        for (unsigned seen = 0;;) {
            for (int i = 0; i < kSpins && jobs.load(std::memory_order_acquire) == seen; i++) simd::pause();
            jobs.wait(seen, std::memory_order_acquire);  // asleep between steps
            seen = jobs.load(std::memory_order_acquire);
            if (job_ == nullptr) return;
            note_processor();
            (*job_)();
        }
    }
    // Wakes the first `count` threads for the current job_.
    void wake(int count) {
        for (int i = 1; i < count; i++) {
            jobs_[i].value.fetch_add(1);
            jobs_[i].value.notify_one();
        }
    }
    void end() {
        job_ = nullptr;
        wake(static_cast<int>(threads_.size()) + 1);
        for (auto& thread : threads_) thread.join();
    }
    void barrier() {
        note_processor();
        const unsigned phase = phases_.load(std::memory_order_relaxed);
        const int others = active_ - 1;  // read before this thread arrives: the next job may change it
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == others) {
            arrived_.store(0, std::memory_order_relaxed);
            for (int i = 0; i < active_; i++) next_[i].value.store(0, std::memory_order_relaxed);
            next_first_.store(0, std::memory_order_relaxed);
            done_.store(0, std::memory_order_relaxed);
            phases_.fetch_add(1);
            wake_sleepers(phases_);
        } else {
            wait(phases_, [=](unsigned now) { return now != phase; });
        }
    }
    // Waits until the number, which other threads change, meets the condition.
    template <class Number, class Condition>
    void wait(std::atomic<Number>& number, Condition condition) {
        Number now;
        for (int i = 0; !condition(now = number.load(std::memory_order_acquire)); i++) {
            if (i < kSpins) {
                simd::pause();
                continue;
            }
            if (i == kSpins) leave_shared_processor();
            if (i < kSpins + kYields) {
                sched_yield();  // the awaited thread may need this processor
                continue;
            }
            num_sleepers_.fetch_add(1);
            number.wait(now, std::memory_order_acquire);
            num_sleepers_.fetch_sub(1);
        }
    }
    // Called after a change of the number. The change and the count of sleepers are sequentially consistent: either
    // this thread sees the sleeper, or the sleeper sees the change and doesn't sleep.
    template <class Number>
    void wake_sleepers(std::atomic<Number>& number) {
        if (num_sleepers_.load() > 0) number.notify_all();
    }
    void note_processor() { processors_[number_].value.store(sched_getcpu(), std::memory_order_relaxed); }
    // If another of the team's threads was last seen on this processor, moves to a processor without any of them.
    void leave_shared_processor() {
        const int here = sched_getcpu();
        bool is_shared = false;
        cpu_set_t allowed, free;
        if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;  // more processors than a cpu_set_t holds
        free = allowed;
        for (int i = 0; i < size_; i++) {
            const int processor = processors_[i].value.load(std::memory_order_relaxed);
            is_shared |= i != number_ && processor == here;
            CPU_CLR(processor, &free);
        }
        if (!is_shared || CPU_COUNT(&free) == 0) return;
        if (sched_setaffinity(0, sizeof free, &free) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
        note_processor();
    }

    static constexpr int kSpins = 2000;   // about 25 to 90 us
    static constexpr int kYields = 1000;  // half a millisecond if nothing else runs
    static constexpr int kAllDone = 1 << 30;
    // Scratch memory is in members, since glibc ends the process if it can't allocate a thread_local.
    static inline thread_local int number_ = 0;
    const int size_;
    int active_;
    std::vector<std::thread> threads_;
    const std::function<void()>* job_ = nullptr;
    std::exception_ptr failure_;
    std::atomic<bool> has_failed_{false};
    std::vector<Jobs> jobs_;  // each thread's number of wake-ups; unused for the caller of `run`
    std::vector<Counter> next_;
    std::vector<Counter> processors_;  // where each thread last ran; -1 if unknown
    alignas(64) std::atomic<int> next_first_{0};
    alignas(64) std::atomic<int> done_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<unsigned> phases_{0};
    alignas(64) std::atomic<int> num_sleepers_{0};
};
