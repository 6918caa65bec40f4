// MLPs: the first product with its activation, and backward through the second product and the activation.
#include <bigkernels/layers.h>

#include <algorithm>

#include "linear.h"

namespace bigkernels {

// For `for_groups`: a call whose results may be two arrays.
static bool streams(const ActivatedLinear& a, int64_t row_bytes, int64_t all_bytes) {
  auto fits = [&](const void* to) { return !to || worth_streaming(to, row_bytes, all_bytes); };
  return fits(a.out) && fits(a.activated);
}
static void move_on(ActivatedLinear& a, int64_t bytes) {
  if (a.out) a.out = (char*)a.out + bytes;
  if (a.activated) a.activated = (char*)a.activated + bytes;
  if (a.before) a.before = (const char*)a.before + bytes;
}

namespace {

constexpr const char* kOp = "mlp";
constexpr int64_t kChunk = 1024;  // elements of a row, where an activation is made by itself

Activation activation_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number < kActivations, "bigkernels::mlp: no activation number ", number);
  return (Activation)number;
}

void activated_many(const ActivatedLinear& a, bool backward) {
  const CpuTable& kernels = table();
  for_groups(
      a, backward ? a.k : a.n, kernels.linear_row_block_bytes(a, backward),
      [&](const ActivatedLinear& part, int64_t begin, int64_t end, char* left, float*) {
        kernels.linear_pack_left(part, backward, begin, end, left);
      },
      [&](const ActivatedLinear& part, const char* left, const float*, int64_t begin, int64_t end) {
        Scratch memory(kernels.linear_workspace(part, kColumns));
        layer_table().activated_linear(part, backward, left, begin, end, memory.data());
      });
}

// The activation of `count` contiguous elements by itself, or its gradient.
void activate(Kernel<Activate> kernel, Activate a, int64_t count) {
  int64_t bytes = size_of(a.type);
  a.n = kChunk;
  auto streams = [&](const void* to) { return !to || worth_streaming(to, kChunk * bytes, count * bytes); };
  a.stream = a.out != a.in && a.out != a.grad && streams(a.out) && streams(a.value);
  parallel_rows(count / kChunk, 4 * kChunk * bytes, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  int64_t done = count / kChunk * kChunk;
  if (done == count) return;
  auto past = [&](auto* p) { return p ? (decltype(p))((char*)p + done * bytes) : p; };
  a.in = (const char*)a.in + done * bytes, a.out = (char*)a.out + done * bytes;
  a.grad = past(a.grad), a.value = past(a.value);
  a.n = count - done, a.stream = false;
  kernel(a, 0, 1);
}

Tensor as_run(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

void check_matrix(const Tensor& weight) {
  check_cpu(kOp, "weight", weight);
  STD_TORCH_CHECK(weight.dim() == 2, "bigkernels::mlp: weight must be a matrix");
}
void check_rows(const char* name, const Tensor& t, int64_t elements) {
  check_cpu(kOp, name, t);
  STD_TORCH_CHECK(t.dim() >= 1 && t.size(t.dim() - 1) == elements, "bigkernels::mlp: ", name, " does not have rows of ",
                  elements);
}

std::tuple<Tensor, Tensor> forward(Tensor x, MaybeTensor weight, MaybeTensor bias, int64_t activation, bool keep) {
  check_cpu(kOp, "x", x);
  Activation act = activation_of(activation);
  if (!weight) {
    Tensor in = as_run(x), out = empty_contiguous_like(x);
    Activate a{};
    a.in = in.const_data_ptr(), a.out = out.mutable_data_ptr();
    a.type = type_of(x), a.act = act;
    activate(layer_table().activate_fwd, a, x.numel());
    return {out, none(x)};
  }
  check_matrix(*weight);
  check_rows("x", x, weight->size(1));
  ActivatedLinear a{};
  RowView stored(*weight), rows(x);
  set_weight(a, stored.rows, *weight, weight->size(0), weight->size(1));
  a.in = rows.rows, a.type = a.out_type = type_of(x);
  VectorView added(kOp, "bias", bias, a.n);
  a.bias = added.data();
  Tensor activated = empty_rows(kOp, x, a.n), before = keep ? empty_rows(kOp, x, a.n) : none(x);
  a.m = activated.numel() / std::max<int64_t>(a.n, 1);
  void* to = activated.mutable_data_ptr();
  bool few = a.m <= table().linear_few_most(a) || a.k == 0;
  a.out = keep ? before.mutable_data_ptr() : few ? to : nullptr;
  if (a.m == 0 || a.n == 0) return {activated, before};
  if (!few) {
    a.act = act, a.activated = to;
    activated_many(a, false);
    return {activated, before};
  }
  if (a.k > 0) {
    linear_few(a);
  } else {
    Tensor& product = keep ? before : activated;
    bias ? torch::stable::copy_(product, *bias) : torch::stable::zero_(product);
  }
  Activate pass{};
  pass.in = a.out, pass.out = to, pass.type = a.type, pass.act = act;
  activate(layer_table().activate_fwd, pass, a.m * a.n);
  return {activated, before};
}

std::tuple<Tensor, Tensor> backward(Tensor grad, MaybeTensor weight, Tensor before, int64_t activation,
                                    bool recompute) {
  check_cpu(kOp, "grad", grad);
  check_cpu(kOp, "before", before);
  STD_TORCH_CHECK(grad.scalar_type() == before.scalar_type(), "bigkernels::mlp: grad and before differ in dtype");
  Activation act = activation_of(activation);
  Tensor kept = as_run(before), out = empty_contiguous_like(before);
  Tensor value = recompute ? empty_contiguous_like(before) : none(before);
  void* value_to = recompute ? value.mutable_data_ptr() : nullptr;
  if (!weight) {
    check_like(kOp, "grad", grad, before);
    Tensor upstream = as_run(grad);
    Activate a{};
    a.in = kept.const_data_ptr(), a.grad = upstream.const_data_ptr();
    a.out = out.mutable_data_ptr(), a.value = value_to;
    a.type = type_of(before), a.act = act;
    activate(layer_table().activate_bwd, a, before.numel());
    return {out, value};
  }
  check_matrix(*weight);
  int64_t n = weight->size(0), k = weight->size(1);
  check_rows("grad", grad, n);
  check_rows("before", before, k);
  RowView rows(grad), stored(*weight);
  ActivatedLinear a{};
  a.in = rows.rows, a.type = a.out_type = type_of(grad);
  set_weight(a, stored.rows, *weight, n, k);
  a.m = before.numel() / std::max<int64_t>(k, 1);
  STD_TORCH_CHECK(n == 0 || k == 0 || a.m == rows.count, "bigkernels::mlp: grad and before differ in tokens");
  a.out = out.mutable_data_ptr();
  a.act = act, a.activated = value_to, a.before = kept.const_data_ptr();
  if (a.m == 0 || k == 0) return {out, value};
  if (n > 0) {
    activated_many(a, true);
    return {out, value};
  }
  torch::stable::zero_(out);
  Activate pass{};
  pass.in = a.before, pass.grad = pass.out = a.out, pass.value = value_to;
  pass.type = a.type, pass.act = act;
  activate(layer_table().activate_bwd, pass, before.numel());
  return {out, value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CPU, m) {
  m.impl("mlp_fwd", TORCH_BOX(&forward));
  m.impl("mlp_bwd", TORCH_BOX(&backward));
}

}  // namespace bigkernels
