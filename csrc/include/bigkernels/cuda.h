// The CUDA kernels as plain functions, which only queue work: on `stream`, a cudaStream_t, of the device `device`. Each
// returns null, or what CUDA has to say about why it could not. Needs no CUDA headers, so that any compiler takes the
// bindings.
#pragma once
#include "optimizer.h"
#include "table.h"

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

// ---- linear layers with quantized weights, a few tokens -------------------------------------------------------------

enum class FewCode : int { int4 = 0, book4 = 1, int8 = 2, fp8 = 3 };
enum class FewOffset : int { none = 0, zero = 1, minimum = 2 };

// out (m, n) = x (m, k) @ weight (n, k)^T + bias, or `backward` out (m, k) = x (m, n) @ weight (n, k), without factors
// and bias. The weight is a copy in the order of matrix fragments (bigkernels/ops/_fragments.py), of runs of 128 of k.
struct FewProduct {
  FewCode code = FewCode::int4;
  FewOffset offset = FewOffset::none;
  int group = 0;           // 32, 64 or 128; 0: a scale a row
  Type type = Type::bf16;  // of x, and of out but where that is float32
  bool wide = false;
  Type bias_type = Type::f32;
  bool backward = false;
  const void* x = nullptr;  // 16-byte aligned, and so is the next row; the depth is a multiple of 8
  int64_t stride = 0;       // of x, in elements
  const void* weight = nullptr;
  const float* factor = nullptr;  // (n), of the rows; null: 1
  const float* book = nullptr;    // (16)
  const void* bias = nullptr;     // (n)
  const float* top = nullptr;     // (1), a power of two, which scales of groups are divided by backward; null: 1
  void* out = nullptr;
  int m = 0, n = 0, k = 0;
};

constexpr int kMostFewTokens = 64;

// What a launch on a device needs, for the same arguments: bytes of memory to work in, and how many counters, which are
// zero before and after it.
const char* few_product_needs(const FewProduct&, int device, int64_t* workspace, int* counters);
const char* few_product(const FewProduct&, void* workspace, int* counters, int device, void* stream);
// Whether the stream is being captured into a CUDA graph, and into which; and zeroes.
const char* capture_of(void* stream, int device, bool* capturing, uint64_t* id);
const char* zero(void* memory, int64_t bytes, int device, void* stream);
const char* wait_for(int device, void* stream);

}  // namespace cuda
}  // namespace bigkernels
