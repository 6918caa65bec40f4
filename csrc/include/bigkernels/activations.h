// The activations that kernels know, in the order of their numbers (bigkernels/ops/activations.py).
#pragma once
#include <cstdint>

#define BK_ACTIVATIONS(X) X(silu) X(gelu) X(gelu_tanh) X(relu) X(relu2) X(sigmoid) X(identity) X(tanh) X(quick_gelu)

namespace bigkernels {

enum class Activation : int32_t {
#define BK_NAME(name) name,
  BK_ACTIVATIONS(BK_NAME)
#undef BK_NAME
};

#define BK_ONE(name) +1
constexpr int kActivations = 0 BK_ACTIVATIONS(BK_ONE);
#undef BK_ONE

}  // namespace bigkernels
