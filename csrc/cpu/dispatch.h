// Which instruction set runs: the best that this processor and this build have, or the one asked for.
#pragma once

#include "cpu/kernels.h"

namespace flex {

// The kernels in use.
const Kernels& kernels();

// Uses the named kernels ("amx", "avx512", "avx2", "generic"), or the best for "auto"; false if they cannot run here.
bool use_kernels(const char* name);

}  // namespace flex
