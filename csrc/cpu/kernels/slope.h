// Activations by value and slope.
#pragma once
#include <bigkernels/program.h>

#include "activation.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

// The activation at x, and its derivative.
template <Activation kind>
BK_INLINE vf activate(vf x, vf* slope) {
  vf b, complement, positive = positive_part(x);
  switch (kind) {
    case Activation::silu: {
      vf s = vsigmoid(x, &complement);
      *slope = s * (x * complement + 1.0f);
      return x * s;
    }
    case Activation::gelu: {
      vf density, p = vnormal(x, &density);
      *slope = x * density + p;
      return x * p;
    }
    case Activation::gelu_tanh: {
      vf s = gelu_tanh_sigmoid(x, &b, &complement);
      *slope = s * (b * complement * (b * b * 0.134145f + 1.0f) * kTwoRootTwoOverPi + 1.0f);
      return x * s;
    }
    case Activation::relu: *slope = select(x <= vf{}, vf{}, splat(1.0f)); return positive;  // 1 at NaN, as in PyTorch
    case Activation::relu2: *slope = positive + positive; return positive * positive;
    case Activation::sigmoid: {
      vf s = vsigmoid(x, &complement);
      *slope = s * complement;
      return s;
    }
    case Activation::identity: *slope = splat(1.0f); return x;
    case Activation::tanh: {
      // (1 - t) (1 + t) would lose the digits of large x: 4 s (1 - s) with s = sigmoid(2x) keeps them.
      vf s = vsigmoid(x + x, &complement);
      *slope = s * complement * 4.0f;
      return vtanh(x);
    }
    case Activation::quick_gelu: {
      vf s = vsigmoid(x * 1.702f, &complement);
      *slope = x * complement * s * 1.702f + s;  // 1.702 last: it would overflow where s is 0
      return x * s;
    }
  }
  __builtin_unreachable();
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
