// Linear layers of a few tokens in a host build: the thread blocks of csrc/cuda/kernels/few_block.cuh one after the
// other, in a given order.
#include <algorithm>

#include "few_kinds.cuh"

namespace bigkernels {
namespace cuda {
namespace {

struct Options {
  int blocks, stages, order;  // order: a number from which the blocks' is drawn; 0: as they are numbered
  bool reversed, early;
};

template <class K>
int run(const FewProduct& p, const Options& o) {
  typedef Parts<K> S;
  const Line line = Line::of<K>(p, o.blocks);
  std::vector<int> order(line.blocks()), counters(line.tiles);
  for (size_t i = 0; i < order.size(); ++i) order[i] = (int)i;
  uint32_t random = (uint32_t)o.order;
  for (size_t i = order.size(); o.order && i > 1; --i)
    std::swap(order[i - 1], order[(random = random * 1664525u + 1013904223u) % i]);
  const float nan = __builtin_nanf("");
  std::vector<Floats4> workspace(2 * order.size() * S::kSums, Floats4{{nan, nan, nan, nan}});
  host.reversed = o.reversed, host.early = o.early;
  for (int block : order) {
    host.groups.clear();
    const size_t bytes = (size_t)S::bytes(p, o.stages);
    std::vector<Quad> shared((bytes + 15) / 16);
    memset(shared.data(), 0xff, bytes);
    Block<K>(p, line, block, o.stages, (char*)shared.data(), workspace.data(), counters.data()).run();
  }
  for (int c : counters)
    if (c) return -1;  // the next launch would find it so
  return (int)order.size();
}

}  // namespace
}  // namespace cuda
}  // namespace bigkernels

using namespace bigkernels;
using namespace bigkernels::cuda;

// How many blocks there were; 0: no kernel; below 0: a counter was left.
extern "C" int host_few(const FewProduct* p, const Options* o) {
  int found = 0;
  const auto f = [&](auto kind) { found = run<decltype(kind)>(*p, *o); };
  switch (p->code) {
    case FewCode::int4: with_kind<FewCode::int4>(*p, f); break;
    case FewCode::book4: with_kind<FewCode::book4>(*p, f); break;
    case FewCode::int8: with_kind<FewCode::int8>(*p, f); break;
    case FewCode::fp8: with_kind<FewCode::fp8>(*p, f); break;
  }
  return found;
}
