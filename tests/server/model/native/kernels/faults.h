// Has requests for memory and for threads fail.
#pragma once
#include "check.h"

void fail_after(int num_requests, int num_failing);  // so many requests succeed, and then so many fail
void pause_failing();
bool fail_no_more();  // whether any has failed

// Runs `work` again and again, the next request failing each time (and `failing` from it on), until all succeed. It
// answers a status, and must end in kOk or kNoMemory.
template <class Work>
void fail_each_in_turn(int failing, Work work) {
    for (int k = 0;; k++) {
        fail_after(k, failing);
        const int status = work();
        const bool has_failed = fail_no_more();
        expect(k < 5000, "it never ends");
        expect(status == kOk || status == kNoMemory, "request %d: status %d", k, status);
        if (!has_failed) {
            expect(status == kOk && k > 20, "%d requests, status %d", k, status);
            return;
        }
        expect(status == kNoMemory, "request %d failed, and the call did not", k);
    }
}
