#pragma once
#include <cstdint>

namespace bigkernels {

// Keeps torch's own threads from spinning on the cores of a program's team, for a second from now on.
void calm_neighbours(int64_t threads);

}  // namespace bigkernels
