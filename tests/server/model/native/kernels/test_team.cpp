#include "kernels/team.h"

#include <chrono>
#include <stdexcept>

#include "check.h"

TEST(each_item_once) {
    for (int size : {1, 2, 3, 5}) {
        Team team(size);
        expect(team.size() == size, "%d threads", team.size());
        for (int count : {0, 1, 2, 7, 100}) {
            std::vector<std::atomic<int>> first(count), second(count), number(size);
            team.run([&] {
                team.each(count, [&](int i) { first[i]++, number[Team::number()]++; });
                team.each(count, [&](int i) {
                    for (auto& of : first) expect(of == 1, "a phase begins before the last has ended");
                    second[i]++;
                });
            });
            int items = 0;
            for (auto& of : number) items += of;
            expect(items == count, "%d items", items);
            for (auto& of : second) expect(of == 1, "an item ran %d times", of.load());
        }
    }
}

TEST(first_items_before_those_that_wait) {
    for (int size : {1, 2, 4}) {
        Team team(size);
        for (int round = 0; round < 20; round++) {
            const int num_first = round * 3;
            std::vector<std::atomic<int>> first(num_first), items(50);
            team.run([&] {
                team.each(
                    num_first, [&](int i) { first[i]++; }, 50,
                    [&](int i) {
                        team.wait_first(num_first);
                        for (auto& of : first) expect(of == 1, "waited for nothing");
                        items[i]++;
                    });
            });
            for (auto& of : items) expect(of == 1, "an item ran %d times", of.load());
        }
    }
}

TEST(part_of_a_team_takes_a_job) {
    Team team(4);
    for (int active : {4, 1, 3, 2, 4, 1}) {
        team.set_active(active);
        std::atomic<int> callers{0}, highest{0}, first{0}, items{0};
        team.run([&] {
            callers++;
            team.each(
                9, [&](int) { first++; }, 1000,
                [&](int) {
                    team.wait_first(9);
                    expect(first == 9, "waited for %d of 9", first.load());
                    for (int before = highest; before < Team::number();)
                        highest.compare_exchange_weak(before, Team::number());
                    items++;
                });
            team.each(5, [&](int) { items++; });
        });
        expect(items == 1005, "%d items", items.load());
        expect(callers == active, "%d threads called the job", callers.load());
        expect(highest < active, "thread %d took part", highest.load());
    }
}

// A container's quota would count the time of a thread that spins.
TEST(threads_sleep_while_they_wait_for_long) {
    auto seconds = [](clockid_t clock) {
        timespec now;
        clock_gettime(clock, &now);
        return now.tv_sec + now.tv_nsec * 1e-9;
    };
    auto slow = [](int i) {
        if (i == 0) std::this_thread::sleep_for(std::chrono::milliseconds(150));
    };
    Team team(3);
    team.run([&] { team.each(3, [](int) {}); });
    const double wall = seconds(CLOCK_MONOTONIC), used = seconds(CLOCK_PROCESS_CPUTIME_ID);
    team.run([&] {
        team.each(3, slow);  // two wait at its end, and then within the next phase
        team.each(1, slow, 3, [&](int) { team.wait_first(1); });
    });
    expect(seconds(CLOCK_MONOTONIC) - wall >= 0.3, "nothing was waited for");
    const double spent = seconds(CLOCK_PROCESS_CPUTIME_ID) - used;
    expect(spent < 0.06, "%g s of processors", spent);
}

// Whatever an item throws comes out of `run`, later phases do nothing, and the team goes on.
TEST(an_item_that_fails_ends_the_job_alone) {
    for (int size : {1, 2, 4}) {
        Team team(size);
        for (int failing = 0; failing < 40; failing += 3) {
            std::atomic<int> later{0};
            std::string text;
            try {
                team.run([&] {
                    team.each(40, [&](int i) {
                        if (i == failing) throw std::runtime_error("item " + std::to_string(i));
                    });
                    team.each(40, [&](int) { later++; });
                });
            } catch (const std::runtime_error& e) {
                text = e.what();
            }
            expect(text == "item " + std::to_string(failing), "it threw %s", text.c_str());
            expect(later == 0, "%d items ran in a later phase", later.load());
            std::atomic<int> items{0};
            team.run([&] { team.each(40, [&](int) { items++; }); });
            expect(items == 40, "%d items", items.load());
        }
    }
}

TEST(nobody_waits_for_a_first_item_that_failed) {
    for (int size : {1, 2, 4}) {
        Team team(size);
        for (int failing = 0; failing < 10; failing++) {
            bool has_thrown = false;
            try {
                team.run([&] {
                    team.each(
                        10,
                        [&](int i) {
                            if (i == failing) throw std::bad_alloc();
                        },
                        30, [&](int) { team.wait_first(10); });
                });
            } catch (const std::bad_alloc&) {
                has_thrown = true;
            }
            expect(has_thrown, "it must come out");
        }
    }
}

TEST(many_failures_are_one) {
    Team team(3);
    for (int round = 0; round < 100; round++) {
        bool has_thrown = false;
        try {
            team.run([&] { team.each(100, [](int i) { throw i; }); });
        } catch (int) {
            has_thrown = true;
        }
        expect(has_thrown, "it must come out");
    }
}

// Both of two threads begin on one processor of several, and may go where they want to.
TEST(threads_on_one_processor_part) {
    constexpr int kPhases = 40, kSoon = 10;
    cpu_set_t allowed, one;
    expect(sched_getaffinity(0, sizeof allowed, &allowed) == 0, "no affinity");
    if (CPU_COUNT(&allowed) < 2) return;
    CPU_ZERO(&one);
    for (int i = 0; CPU_COUNT(&one) == 0; i++)
        if (CPU_ISSET(i, &allowed)) CPU_SET(i, &one);
    auto work = [](int) {
        const auto begun = std::chrono::steady_clock::now();
        while (std::chrono::steady_clock::now() - begun < std::chrono::microseconds(100)) {
        }
    };
    Team team(2);
    int at[kPhases][2];
    team.run([&] {
        sched_setaffinity(0, sizeof one, &one);
        sched_setaffinity(0, sizeof allowed, &allowed);
        for (auto& phase : at) {
            phase[Team::number()] = sched_getcpu();
            team.each(2, work);
        }
    });
    int together = 0;
    while (together < kPhases && at[together][0] == at[together][1]) together++;
    expect(together <= kSoon, "together for %d phases", together);
    cpu_set_t after;
    expect(sched_getaffinity(0, sizeof after, &after) == 0 && CPU_EQUAL(&after, &allowed), "the affinity is another");
}
