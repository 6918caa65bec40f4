// The lengths of a cache while a program alone works on it: bigkernels/program/_cache.py, `Description`.
#pragma once
#include <bigkernels/program.h>

namespace bigkernels {

// Tokens of a layer are slots [begin, end) of its buffers; with `window` those before the last `window` are given up.
struct CacheSlots {
  int64_t begin, end, window;
};

struct CacheLease {
  int64_t valid;  // 0: somebody has changed a layer
  int64_t past;   // tokens that a sequence has seen
  int64_t room;   // for how many more
  int64_t layers;
  LayerCache* rows;
  CacheSlots* slots;
};

// A run has written so many tokens of each sequence.
void advance(CacheLease&, int64_t tokens);

}  // namespace bigkernels
