// The activations of gated units, by their value.
#pragma once
#include <bigkernels/math.h>

namespace bigkernels {
namespace BK_ISA {
namespace {

// gelu_tanh(x) = x sigmoid(2u), for 0.5 (1 + tanh u) would lose the small values for x << 0. Beyond 30 the sigmoid is
// 0 or 1, and u would overflow.
constexpr float kTwoRootTwoOverPi = 1.5957691216f;
BK_INLINE vf gelu_tanh_sigmoid(vf x, vf* bounded, vf* complement) {
  *bounded = vmax(splat(-30.0f), vmin(splat(30.0f), x));
  vf b = *bounded;
  return vsigmoid(b * (b * b * 0.044715f + 1.0f) * kTwoRootTwoOverPi, complement);
}

template <Activation kind>
BK_INLINE vf activate(vf x) {
  vf unused;
  if (kind == Activation::silu) return x * vsigmoid(x);
  if (kind == Activation::gelu) return x * vnormal(x, &unused);
  if (kind == Activation::gelu_tanh) return x * gelu_tanh_sigmoid(x, &unused, &unused);
  if (kind == Activation::sigmoid) return vsigmoid(x);
  vf positive = select_less(x, vf{}, vf{}, x);  // NaN stays
  return kind == Activation::relu ? positive : positive * positive;
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
