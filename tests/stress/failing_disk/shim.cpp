// A disk that fails, below everything that a process does: preloaded, it stands between the process and libc.
//
// Calls that write are counted where they concern what lies under FAILING_DISK_UNDER, whoever makes them: Python,
// SQLite, safetensors. The call numbered `fails_at`, counted from 0, is not made and fails with `error`; where `stays`
// is set, so do all calls after it. FAILING_DISK_CONTROL names a file of one `Control`, by which another process says
// what is to fail, and reads which calls there were. The struct is `FORMAT` of disk.py.
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

namespace {

constexpr int kMaxCalls = 2048;
constexpr int kMaxText = 240;

struct Control {
    int32_t fails_at;  // -1: nothing fails
    int32_t error;     // an errno
    int32_t stays;
    std::atomic<int32_t> num_calls;
    std::atomic<int32_t> num_failed;
    char calls[kMaxCalls][kMaxText];  // "write adapters/ab/…"
};

const char* under() {
    static const char* const path = getenv("FAILING_DISK_UNDER");
    return path;
}

Control* control() {
    static Control* const mapped = [] {
        const char* const path = getenv("FAILING_DISK_CONTROL");
        const int handle = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
        void* const at =
            handle < 0 ? MAP_FAILED : mmap(nullptr, sizeof(Control), PROT_READ | PROT_WRITE, MAP_SHARED, handle, 0);
        if (handle >= 0) close(handle);
        return at == MAP_FAILED ? nullptr : static_cast<Control*>(at);
    }();
    return mapped;
}

// Whether this call is to fail; errno says how then.
bool fails(const char* call, const char* path) {
    if (!under() || strncmp(path, under(), strlen(under())) != 0) return false;
    Control* const it = control();
    if (!it) return false;
    const int number = it->num_calls.fetch_add(1);
    if (number < kMaxCalls) snprintf(it->calls[number], kMaxText, "%s %s", call, path + strlen(under()));
    if (it->fails_at < 0 || (it->stays ? number < it->fails_at : number != it->fails_at)) return false;
    it->num_failed.fetch_add(1);
    errno = it->error;
    return true;
}

bool fails(const char* call, int handle) {
    if (handle <= 2 || !under()) return false;  // what is printed goes where it went
    char link[32], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    const ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return false;
    path[length] = 0;
    return fails(call, path);
}

bool fails_at(const char* call, int directory, const char* name) {
    if (directory == AT_FDCWD || name[0] == '/') return fails(call, name);
    char link[32], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    const ssize_t length = readlink(link, path, sizeof path / 2);
    if (length < 0) return false;
    snprintf(path + length, sizeof path - length, "/%s", name);
    return fails(call, path);
}

bool takes_mode(int flags) { return (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE; }

bool writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); }

template <typename Function>
Function next(Function, const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

}  // namespace

#define NEXT(name) static const auto real = next(&name, #name)

extern "C" {

int open(const char* path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    const mode_t mode = takes_mode(flags) ? va_arg(more, mode_t) : 0;
    va_end(more);
    NEXT(open);
    return writes(flags) && fails("open", path) ? -1 : real(path, flags, mode);
}

int open64(const char* path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    const mode_t mode = takes_mode(flags) ? va_arg(more, mode_t) : 0;
    va_end(more);
    NEXT(open64);
    return writes(flags) && fails("open", path) ? -1 : real(path, flags, mode);
}

ssize_t write(int handle, const void* bytes, size_t size) {
    NEXT(write);
    return fails("write", handle) ? -1 : real(handle, bytes, size);
}

ssize_t writev(int handle, const iovec* parts, int count) {
    NEXT(writev);
    return fails("write", handle) ? -1 : real(handle, parts, count);
}

ssize_t pwrite64(int handle, const void* bytes, size_t size, off64_t offset) {
    NEXT(pwrite64);
    return fails("write", handle) ? -1 : real(handle, bytes, size, offset);
}

ssize_t pwrite(int handle, const void* bytes, size_t size, off_t offset) {
    NEXT(pwrite);
    return fails("write", handle) ? -1 : real(handle, bytes, size, offset);
}

int fsync(int handle) {
    NEXT(fsync);
    return fails("sync", handle) ? -1 : real(handle);
}

int fdatasync(int handle) {
    NEXT(fdatasync);
    return fails("sync", handle) ? -1 : real(handle);
}

int ftruncate64(int handle, off64_t size) noexcept {
    NEXT(ftruncate64);
    return fails("truncate", handle) ? -1 : real(handle, size);
}

int ftruncate(int handle, off_t size) noexcept {
    NEXT(ftruncate);
    return fails("truncate", handle) ? -1 : real(handle, size);
}

int rename(const char* from, const char* to) noexcept {
    NEXT(rename);
    return fails("rename", to) ? -1 : real(from, to);
}

int mkdir(const char* path, mode_t mode) noexcept {
    NEXT(mkdir);
    return fails("mkdir", path) ? -1 : real(path, mode);
}

int unlink(const char* path) noexcept {
    NEXT(unlink);
    return fails("unlink", path) ? -1 : real(path);
}

int unlinkat(int directory, const char* name, int flags) noexcept {
    NEXT(unlinkat);
    return fails_at("unlink", directory, name) ? -1 : real(directory, name, flags);
}

int rmdir(const char* path) noexcept {
    NEXT(rmdir);
    return fails("unlink", path) ? -1 : real(path);
}
}
