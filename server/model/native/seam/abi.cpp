// What the library says about itself: its source, its compiler, and whether this processor can run it.
#include "abi.h"

#include "kernels/blocks/amx.h"

const char* smolora_source() { return SMOLORA_SOURCE; }

const char* smolora_compiler() {
#ifdef __clang__
#define SMOLORA_COMPILER __VERSION__ " " SMOLORA_FLAGS
#else
#define SMOLORA_COMPILER "g++ " __VERSION__ " " SMOLORA_FLAGS
#endif
    return has_amx() ? SMOLORA_COMPILER ", with AMX" : SMOLORA_COMPILER;
}

int smolora_is_supported() { return simd::is_supported(); }
