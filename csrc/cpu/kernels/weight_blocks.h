// Blocks of a weight, whatever it is stored as, as right operands of the GEMM micro-kernel.
#pragma once
#include "gemm.h"
#include "linear_codes.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

constexpr int64_t kDepth = 256;  // of the weight, decoded at once
constexpr int64_t kDeep = kDepth / kSide;

// Where block i of row block s is on the left. What is read together lies together, a chunk of the depth after the
// other: row blocks as wide as the depth, often a power of two apart, would fall into the same few sets of the cache.
template <class F>
BK_INLINE int64_t left_at(int64_t s, int64_t i, int64_t row_blocks, int64_t all) {
  int64_t chunk = i / kDeep * kDeep, deep = all - chunk < kDeep ? all - chunk : kDeep;
  return (chunk * row_blocks + s * deep + i - chunk) * F::kBlock;
}

// Rows [n, n + rows) and elements [k, k + span) of a weight as T, decoded or where they are.
template <class T>
struct WeightPart {
  typedef typename FormatOf<T>::type F;
  typedef typename F::Element E;

  const T* first = nullptr;
  int64_t n = 0, k = 0, stride = 0;

  // Into `memory` where the weight is not of this type itself.
  void decode(const Linear& a, int64_t from_n, int64_t rows, int64_t from_k, int64_t span, T* memory) {
    if (a.kind == plain_kind<T>) {
      first = (const T*)a.codes, stride = a.code_row / (int64_t)sizeof(T);
      return;
    }
    first = memory, n = from_n, k = from_k, stride = span;
    for (int64_t r = 0; r < rows && n + r < a.n; ++r) decode_row(a, n + r, k, span, memory + r * span);
  }
  // Block (rows of the weight from row, elements from at) as a right operand.
  void put(const Linear& a, bool backward, int64_t row, int64_t at, E* to) const {
    alignas(64) E staged[F::kBlock];
    const T* from = first + (row - n) * stride + at - k;
    const E* block = staged;
    int64_t line = kSide;
    if (F::template holds<T>() && row + kSide <= a.n && at + kSide <= a.k) {
      block = (const E*)from, line = stride;
    } else {
      F::template stage<T>(staged, StridedRows<T>{from, stride, a.n - row}, 0, 0, a.k - at);
    }
    if (backward) {
      F::right(to, block, line);
    } else {
      F::right_transposed(to, block, line);
    }
  }
};

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
