// Activations by their value.
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

BK_INLINE vf positive_part(vf x) { return select_less(x, vf{}, vf{}, x); }  // NaN stays

template <Activation kind>
BK_INLINE vf activate(vf x) {
  vf unused, positive = positive_part(x);
  switch (kind) {
    case Activation::silu: return x * vsigmoid(x);
    case Activation::gelu: return x * vnormal(x, &unused);
    case Activation::gelu_tanh: return x * gelu_tanh_sigmoid(x, &unused, &unused);
    case Activation::relu: return positive;
    case Activation::relu2: return positive * positive;
    case Activation::sigmoid: return vsigmoid(x);
    case Activation::identity: return x;
    case Activation::tanh: return vtanh(x);
    case Activation::quick_gelu: return x * vsigmoid(x * 1.702f);
  }
  __builtin_unreachable();
}

// run(a type whose `kind` is the activation): what is to be compiled once for each of them.
template <Activation K>
struct Kind {
  static constexpr Activation kind = K;
};
template <class Run>
BK_INLINE auto by_activation(Activation kind, Run run) {
  switch (kind) {
#define BK_CASE(name) \
  case Activation::name: return run(Kind<Activation::name>());
    BK_ACTIVATIONS(BK_CASE)
#undef BK_CASE
  }
  __builtin_unreachable();
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
