// The C ABI between libflowgrpo_native and flowgrpo_kernels/_native.py. Plain C types only.
#pragma once

#include <stdint.h>

// Raised whenever a struct, a signature or the meaning of an argument changes; _native.py refuses a library
// with another number.
#define FLOWGRPO_ABI 1

extern "C" {

int32_t flowgrpo_native_abi(void);
const char* flowgrpo_native_version(void);
}
