#include "abi.h"

#define FG_EXPORT extern "C" __attribute__((visibility("default")))

FG_EXPORT int32_t flowgrpo_native_abi(void) { return FLOWGRPO_ABI; }
FG_EXPORT const char* flowgrpo_native_version(void) { return FLOWGRPO_VERSION; }
