#include "faults.h"

#include <errno.h>
#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

static std::atomic<bool> is_armed{false}, has_failed{false};
static std::atomic<int> num_left{0}, num_failing_left{0};

void fail_after(int num_requests, int num_failing) {
    num_left = num_requests, num_failing_left = num_failing, has_failed = false, is_armed = true;
}

void pause_failing() { is_armed = false; }

bool fail_no_more() {
    is_armed = false;
    return has_failed;
}

static bool fails() {
    if (!is_armed || num_left.fetch_sub(1) > 0 || num_failing_left.fetch_sub(1) <= 0) return false;
    return has_failed = true;
}

static void* allocate_or_fail(size_t size, size_t alignment) {
    void* p = aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);  // the one below
    if (p == nullptr) throw std::bad_alloc();
    return p;
}

void* operator new(size_t size) { return allocate_or_fail(size, alignof(std::max_align_t)); }
void* operator new(size_t size, std::align_val_t alignment) { return allocate_or_fail(size, (size_t)alignment); }
void operator delete(void* p) noexcept { free(p); }
void operator delete(void* p, size_t) noexcept { free(p); }
void operator delete(void* p, std::align_val_t) noexcept { free(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { free(p); }

// The linker has these called in the place of the real ones (--wrap).
extern "C" {
void* __real_aligned_alloc(size_t, size_t);
void* __wrap_aligned_alloc(size_t alignment, size_t size) {
    return fails() ? nullptr : __real_aligned_alloc(alignment, size);
}
int __real_pthread_create(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
int __wrap_pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* argument) {
    return fails() ? EAGAIN : __real_pthread_create(thread, attributes, start, argument);
}
}
