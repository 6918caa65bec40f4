// What an optimizer step works on, as plain memory: the same records are read by the CPU kernels and, copied to a
// device, the CUDA kernels. Includes neither torch nor the C++ library.
#pragma once
#include <stdint.h>

namespace bigkernels {

// The update rules (update.h). `muon` makes the matrix that is orthogonalised afterwards, in the parameter's place.
enum class Algorithm : int { adam = 0, sgd = 1, rmsprop = 2, adagrad = 3, lion = 4, lamb = 5, muon = 6, adamax = 7 };
constexpr Algorithm kLastAlgorithm = Algorithm::adamax;

enum class StateType : int { f32 = 0, bf16 = 1, int8 = 2 };

enum class Rounding : int { nearest = 0, stochastic = 1, kahan = 2 };

// Flags of a group.
enum : int {
  kMaximize = 1,
  kDecoupled = 2,  // the decay multiplies the parameter; else it is added to the gradient
  kCautious = 4,   // the decay only where it has the direction of the update
  kAmsgrad = 8,
  kNesterov = 16,
  kMomentum = 32,
  kCentered = 64,
};

constexpr int kStates = 3;             // at most, of one algorithm
constexpr int64_t kStateBlock = 256;   // elements that share a scale in 8 bits
constexpr int64_t kChunk = 128 * 256;  // elements of a tensor at most, in one call of a kernel

// One parameter: bigkernels/optim/_plan.py writes these records. Pointers are to dense memory of `n` elements in one
// order; those that do not apply are null.
struct OptimizerTensor {
  void* param;
  void* state[kStates];
  float* scale[kStates];  // of int8 states, one a block
  int16_t* remainder;     // what rounding took from the parameter ("kahan")
  float* ema;
  double* step;
  int64_t n;
  int64_t group;
  int64_t param_type;  // Type
  int64_t state_type;  // StateType
};

// The gradient of one parameter in this step.
struct OptimizerGrad {
  const void* data;
  int64_t type;  // Type
};

// Elements [begin, end) of a tensor; `begin` is a multiple of a block.
struct OptimizerChunk {
  int64_t tensor, begin, end;
};

// The options of a parameter group, from the same place.
struct OptimizerGroup {
  double lr, beta1, beta2, eps, weight_decay;
  double momentum, dampening, lr_decay, ema_decay;
  const void* lr_tensor;  // replaces lr: one float32 or float64 on the parameters' device
  int64_t lr_is_double;
  int64_t flags;
  int64_t rounding;  // Rounding
  uint64_t seed;
};

// What the elements of one tensor are multiplied with in this step.
struct OptimizerScalars {
  float grad_factor;  // clipping, loss scale and maximize
  float l2, keep, shrink;
  float beta1, rest1, beta2, rest2, eps, lr, step_size, second;
  float momentum, damped, ema;
  int32_t flags, rounding;
  uint32_t key;  // of the random numbers: seed and step
  float trust;   // LAMB, known after the first pass
};

}  // namespace bigkernels
