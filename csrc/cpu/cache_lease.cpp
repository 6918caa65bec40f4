#include "cache_lease.h"

#include <algorithm>

namespace bigkernels {

void advance(CacheLease& lease, int64_t tokens) {
  lease.past += tokens;
  lease.room -= tokens;
  for (int64_t i = 0; i < lease.layers; ++i) {
    CacheSlots& s = lease.slots[i];
    LayerCache& row = lease.rows[i];
    s.end += tokens;
    if (const int64_t gone = s.window ? std::max<int64_t>(s.end - s.window - s.begin, 0) : 0) {
      const int64_t size = row.bits == 8 ? 1 : size_of(row.type);
      s.begin += gone;
      row.capacity -= gone;
      row.k = (char*)row.k + gone * row.k_token * size;
      row.v = (char*)row.v + gone * row.v_token * size;
      if (row.bits) row.k_scale += gone, row.v_scale += gone;
    }
    row.held = s.end - s.begin;
  }
}

}  // namespace bigkernels

extern "C" __attribute__((visibility("default"))) void bk_cache_advance(bigkernels::CacheLease* lease, int64_t tokens) {
  bigkernels::advance(*lease, tokens);
}
