// Wraps every entry: an exception becomes a status and a text, and ends the call, never the process.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <exception>
#include <new>
#include <system_error>

#include "abi.h"

struct Invalid : std::exception {
    char text[kErrorSize];
    const char* what() const noexcept override { return text; }
};

// Throws Invalid with a text formatted as by printf.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void refuse(const char* format, ...) {
    Invalid invalid;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(invalid.text, sizeof invalid.text, format, arguments);
    va_end(arguments);
    throw invalid;
}

// Returns the call's status. If it isn't kOk, `error` (kErrorSize bytes) says why.
template <class Call>
int guarded(char* error, Call call) noexcept {
    auto fail = [&](Status status, const char* text) {
        snprintf(error, kErrorSize, "%s", text);
        return status;
    };
    try {
        call();
        return kOk;
    } catch (const std::bad_alloc&) {
        return fail(kNoMemory, "no memory for it in native code");
    } catch (const std::system_error& e) {  // std::thread's
        return fail(kNoMemory, e.code() == std::errc::resource_unavailable_try_again
                                   ? "no thread can be started for native code"
                                   : e.what());
    } catch (const Invalid& e) {
        return fail(kInvalid, e.what());
    } catch (const std::exception& e) {
        return fail(kFailed, e.what());
    } catch (...) {
        return fail(kFailed, "native code failed");
    }
}
