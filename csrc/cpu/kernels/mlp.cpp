// A linear layer of many tokens and the activation of an MLP.
#include "linear_many.h"

namespace bigkernels {
namespace BK_ISA {

void activated_linear(const ActivatedLinear& a, bool backward, const void* left, int64_t begin, int64_t end,
                      void* memory) {
  with_many(a,
            [&](auto many) { many.columns(a, backward, (const typename decltype(many)::E*)left, begin, end, memory); });
}

}  // namespace BK_ISA
}  // namespace bigkernels
