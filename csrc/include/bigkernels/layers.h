// The kernels of whole layers, MLPs and the norms of images, and the table that holds one level's copies of them.
#pragma once
#include "program.h"

namespace bigkernels {

// The activation of an MLP in the pass that writes a product, which has the shape and type of `out`. Forward it is of
// the product, and `out` is null where the product itself is not wanted. Backward `before` is that product: `activated`
// is its activation again (null: not wanted), and `out` the gradient times its slope.
struct ActivatedLinear : Linear {
  Activation act;
  void* activated;
  const void* before;  // null: forward
};

// An activation by itself, on rows of `n` elements, one after the other: out = act(in), or out = grad * slope at in
// and, unless it is null, value = act(in).
struct Activate {
  const void *in, *grad;
  void *out, *value;
  int64_t n;
  Type type;
  Activation act;
  bool stream;
};

// GroupNorm and BatchNorm, on arrays in one layout: planes, runs of one channel's elements, to which one value each
// belongs; or rows of n channels, to which n values each belong.
struct ChannelNorm {
  const void *x, *residual, *grad;
  const void* result;  // backward of ReLU: its output, which says where its slope is 0; null: made from x
  void *out, *out_residual;
  const float *mean, *scale, *shift;       // the activation is of (x - mean) * scale + shift + residual
  const float* rstd;                       // of backward's sums: of g and of g * (x - mean) * rstd, g behind it
  const float *of_grad, *of_x, *constant;  // backward: g * of_grad + (x - mean) * of_x + constant
  int64_t n;
  Type type;
  Activation act;  // silu, gelu, gelu_tanh, relu or identity
  bool stream;
};

struct LayerTable {
  // As linear_many, from operands that linear_pack_left made.
  void (*activated_linear)(const ActivatedLinear&, bool backward, const void* left, int64_t begin, int64_t end,
                           void* workspace);
  Kernel<Activate> activate_fwd;
  Kernel<Activate> activate_bwd;
  // Elements of a plane, or rows. Moments: sums of x - mean and of its square. `recent` holds zeros; sums are added to
  // what is there.
  void (*norm_run_moments)(const ChannelNorm&, int64_t begin, int64_t end, double* sums);
  void (*norm_rows_moments)(const ChannelNorm&, int64_t begin, int64_t end, float* recent, double* sums);
  void (*norm_run_bwd_sums)(const ChannelNorm&, int64_t begin, int64_t end, double* sums);
  void (*norm_rows_bwd_sums)(const ChannelNorm&, int64_t begin, int64_t end, float* recent, double* sums);
  Kernel<ChannelNorm> norm_run;
  Kernel<ChannelNorm> norm_rows;
  Kernel<ChannelNorm> norm_run_bwd;
  Kernel<ChannelNorm> norm_rows_bwd;
};

const LayerTable& layer_table();  // the chosen level's

}  // namespace bigkernels
