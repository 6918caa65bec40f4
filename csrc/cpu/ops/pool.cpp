// bigkernels.memory: the switch and the counters of csrc/cpu/pool.cpp, and the workspaces that operators keep.
#include <bigkernels/pool.h>
#include <bigkernels/stable.h>

#include <string>

namespace bigkernels {
namespace {

// Why not, or nothing.
std::string on(int64_t limit, bool huge_pages) {
  const char* reason = pool_on(limit, huge_pages);
  return reason ? reason : "";
}

void off() { pool_off(); }

int64_t trim() { return pool_trim(); }

std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t> stats() {
  PoolStats s = pool_stats();
  return {s.in_use, s.cached, s.reserved, s.peak, s.hits, s.misses, s.given_back};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CompositeExplicitAutograd, m) {
  m.impl("pool_on", TORCH_BOX(&on));
  m.impl("pool_off", TORCH_BOX(&off));
  m.impl("pool_trim", TORCH_BOX(&trim));
  m.impl("pool_stats", TORCH_BOX(&stats));
  m.impl("workspaces_kept", TORCH_BOX(&workspaces_kept));
  m.impl("release_workspaces", TORCH_BOX(&release_workspaces));
  m.impl("limit_workspaces", TORCH_BOX(&limit_workspaces));
}

}  // namespace bigkernels
