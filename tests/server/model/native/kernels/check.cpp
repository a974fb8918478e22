// Runs all tests, or those that are named.
#include "check.h"

#include <cstdarg>
#include <cstdio>
#include <exception>

namespace {

struct Failed : std::exception {
    std::string text;
    const char* what() const noexcept override { return text.c_str(); }
};

[[noreturn]] void fail(const char* format, va_list arguments, const std::string& more) {
    char text[300];
    vsnprintf(text, sizeof text, format, arguments);
    Failed failed;
    failed.text = text + more;
    throw failed;
}

}  // namespace

std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

void expect(bool is_so, const char* format, ...) {
    if (is_so) return;
    va_list arguments;
    va_start(arguments, format);
    fail(format, arguments, "");
}

void expect_near(double found, double exact, double bound, const char* format, ...) {
    if (std::abs(found - exact) <= bound) return;  // not for NaN either
    va_list arguments;
    va_start(arguments, format);
    char text[160];
    snprintf(text, sizeof text, ": %.9g, not %.9g within %.3g", found, exact, bound);
    fail(format, arguments, text);
}

int main(int count, char** names) {
    int num_failed = 0, num_run = 0;
    for (const Test& test : tests()) {
        bool is_wanted = count == 1;
        for (int i = 1; i < count; i++) is_wanted = is_wanted || !strcmp(names[i], test.name);
        if (!is_wanted) continue;
        num_run++;
        try {
            test.run();
            printf("passed %s\n", test.name);
        } catch (const std::exception& e) {
            num_failed++;
            printf("failed %s: %s\n", test.name, e.what());
        }
        fflush(stdout);
    }
    if (count > 1 && num_run != count - 1) printf("failed: no such test\n");
    return num_failed > 0 || num_run == 0 || (count > 1 && num_run != count - 1);
}
