#include "kernels/team.h"

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
