// The CUDA kernels as plain functions, which only queue work: on `stream`, a cudaStream_t, of the device `device`. Each
// returns null, or what CUDA has to say about why it could not. Needs no CUDA headers, so that any compiler takes the
// bindings.
#pragma once
#include "optimizer.h"

namespace bigkernels {
namespace cuda {

// All on the device.
struct OptimizerLists {
  const OptimizerTensor* tensors;
  const OptimizerGrad* grads;
  const OptimizerChunk* chunks;  // in the order of their tensors
  const OptimizerGroup* groups;  // not for norms
  int64_t tensor_count, chunk_count;
};

// One float32 or float64 on the device; null where there is none.
struct Scalar {
  const void* value = nullptr;
  bool is_double = false;
};

// What the step depends on besides its lists. Nothing is done where `found_inf` is not zero.
struct OptimizerFactors {
  Scalar grad_scale, found_inf, divisor, norm;
  double max_norm = 0;
};

// Bytes of device memory that any of the functions below works in.
int64_t optimizer_workspace(int64_t tensor_count, int64_t chunk_count);

// trust: one float a tensor, from the pass of optimizer_measure, which has counted the step; null without such a pass.
const char* optimizer_step(Algorithm, const OptimizerLists&, const OptimizerFactors&, const float* trust,
                           void* workspace, int device, void* stream);
// sums: two a tensor.
const char* optimizer_measure(const OptimizerLists&, const OptimizerFactors&, double* sums, void* workspace, int device,
                              void* stream);
// out: one a tensor.
const char* optimizer_norm(const OptimizerLists&, double* out, bool infinity, void* workspace, int device,
                           void* stream);

}  // namespace cuda
}  // namespace bigkernels
