// Parts of rows, as the row records and the experts of a step program read and write them: whole vectors and the end of
// a row by the same arithmetic, so that where a chunk ends changes no bit.
#pragma once
#include <bigkernels/program.h>

#include "activation.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

template <class T>
BK_INLINE vf part(const T* p, int64_t n) {
  return n >= W ? load(p) : load(p, n);
}
BK_INLINE void put(float* p, vf v, int64_t n) { n >= W ? store(p, v) : store(p, v, n); }

// Up to W elements of a vector from i on.
BK_INLINE vf part(const Vector& v, int64_t i, int64_t n) {
  return by_type(v.type, [&](auto t) __attribute__((always_inline)) { return part((decltype(t)*)v.data + i, n); });
}

BK_INLINE vf activation(Activation act, vf x, float alpha) {
  if (act == Activation::quick_gelu) return x * vsigmoid(x * alpha);
  return by_activation(act,
                       [&](auto kind) __attribute__((always_inline)) { return activate<decltype(kind)::kind>(x); });
}

// The lanes from n on, which no sum may see, are 0.
BK_INLINE vf within(vf v, int64_t n) {
  if (n < W)
    for (int i = 0; i < W; ++i) v[i] = i < n ? v[i] : 0.0f;
  return v;
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
