// Random words for stochastic rounding: a hash of a key and an element's place, so that no state goes along.
#pragma once
#include <bigkernels/vec.h>

namespace bigkernels {
namespace BK_ISA {
namespace {

// Of elements from `element` on.
BK_INLINE vu random_words(uint32_t key, int64_t element) {
  vu lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  vu x = (lane + (uint32_t)element) ^ key;
  x = (x ^ (x >> 16)) * 0x21f0aaadu;
  x = (x ^ (x >> 15)) * 0xd35a2d97u;
  return x ^ (x >> 15);
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
