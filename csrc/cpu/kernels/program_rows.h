// Parts of rows, as the row records and the experts of a step program read and write them: whole vectors and the end of
// a row by the same arithmetic, so that where a chunk ends changes no bit.
#pragma once
#include <bigkernels/program.h>

#include "activation.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

BK_INLINE vf part(const float* p, int64_t n) { return n >= W ? load(p) : load(p, n); }
BK_INLINE void put(float* p, vf v, int64_t n) { n >= W ? store(p, v) : store(p, v, n); }

// Up to W elements of a vector from i on.
BK_INLINE vf part(const Vector& v, int64_t i, int64_t n) {
  switch (v.type) {
    case Type::f32: return part((const float*)v.data + i, n);
    case Type::bf16: return n >= W ? load((const bf16*)v.data + i) : load((const bf16*)v.data + i, n);
    default: return n >= W ? load((const f16*)v.data + i) : load((const f16*)v.data + i, n);
  }
}

BK_INLINE vf activation(Act act, vf x, float alpha) {
  switch (act) {
    case Act::silu: return activate<Activation::silu>(x);
    case Act::gelu: return activate<Activation::gelu>(x);
    case Act::gelu_tanh: return activate<Activation::gelu_tanh>(x);
    case Act::relu: return activate<Activation::relu>(x);
    case Act::relu2: return activate<Activation::relu2>(x);
    case Act::sigmoid: return vsigmoid(x);
    case Act::tanh: return vtanh(x);
    case Act::quick_gelu: return x * vsigmoid(x * alpha);
    default: return x;
  }
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
