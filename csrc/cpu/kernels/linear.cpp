// Linear layers, many tokens (linear_many.h).
#include "linear_many.h"

namespace bigkernels {
namespace BK_ISA {

void decode_blocks_row(const Weight& w, int64_t n, float* out) { decode_blocks(w, n, 0, w.k, out); }

void linear_pack_left(const Linear& a, bool backward, int64_t begin, int64_t end, void* left) {
  with_many(a, [&](auto many) { many.pack_left(a, backward, begin, end, (typename decltype(many)::E*)left); });
}
void linear_many(const Linear& a, bool backward, const void* left, int64_t begin, int64_t end, void* memory) {
  with_many(a,
            [&](auto many) { many.columns(a, backward, (const typename decltype(many)::E*)left, begin, end, memory); });
}
int64_t linear_row_block_bytes(const Linear& a, bool backward) {
  return with_many(a, [&](auto many) { return many.row_block_bytes(a, backward); });
}
int64_t linear_workspace(const Linear& a, int64_t columns) {
  return with_many(a, [&](auto many) { return many.workspace(a, columns); });
}
void linear_pack_right(const Linear& a, int64_t begin, int64_t end, void* packed) {
  with_many(a, [&](auto many) { many.pack_right(a, begin, end, (typename decltype(many)::E*)packed); });
}
int64_t linear_packed_row_block_bytes(const Linear& a) {
  return with_many(a, [&](auto many) { return many.row_block_bytes(a, false); });
}

}  // namespace BK_ISA
}  // namespace bigkernels
