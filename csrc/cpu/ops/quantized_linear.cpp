#include <algorithm>

#include "quantized_weight.h"

namespace bigkernels {
namespace {

constexpr const char* kOp = "quantized_linear";

constexpr int64_t kMostExact = 1 << 17;  // products of 8-bit integers whose sum 32 bits hold

void run_dynamic(const Linear& a) {
  const CpuTable& kernels = table();
  int64_t row_block_bytes = kernels.linear_dynamic_row_block_bytes(a);
  for_groups(
      a, a.n, row_block_bytes,
      [&](const Linear& part, int64_t begin, int64_t end, char* left, float* scales) {
        Scratch token(kernels.linear_dynamic_token(part));
        kernels.linear_dynamic_pack(part, begin, end, left, scales, token.data());
      },
      [&](const Linear& part, const char* left, const float* scales, int64_t begin, int64_t end) {
        Scratch memory(kernels.linear_dynamic_workspace(part, kColumns));
        kernels.linear_dynamic(part, left, scales, begin, end, memory.data());
      });
}

Tensor forward(Tensor x, Tensor codes, MaybeTensor scale, MaybeTensor zero, MaybeTensor row_scale, MaybeTensor book,
               MaybeTensor bias, int64_t group, int64_t kind, int64_t k, bool dynamic, bool wide) {
  check_cpu(kOp, "x", x);
  QuantizedWeight w(kOp, codes, scale, zero, row_scale, book, group, kind, k);
  Linear& a = w.a;
  STD_TORCH_CHECK(!dynamic || (a.kind == Codes::int8 && k <= kMostExact), "bigkernels::", kOp,
                  ": tokens are rounded for int8 codes alone, of rows of at most ", kMostExact);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, "bigkernels::", kOp, ": x does not have rows of ", k);
  a.type = type_of(x), a.out_type = wide ? Type::f32 : a.type;
  VectorView added(kOp, "bias", bias, a.n);
  a.bias = added.data();
  RowView rows(x);
  Tensor out = empty_rows(kOp, x, a.n, wide);
  a.in = rows.rows, a.out = out.mutable_data_ptr();
  a.m = out.numel() / std::max<int64_t>(a.n, 1);
  if (a.m == 0 || a.n == 0) return out;
  if (k == 0) return bias ? torch::stable::copy_(out, *bias) : torch::stable::zero_(out);
  if (dynamic) {
    run_dynamic(a);
  } else if (a.m <= table().linear_few_most(a)) {
    linear_few(a);
  } else {
    linear_many(a, false);
  }
  return out;
}

Tensor backward(Tensor grad, Tensor codes, MaybeTensor scale, MaybeTensor zero, MaybeTensor row_scale, MaybeTensor book,
                int64_t group, int64_t kind, int64_t k) {
  check_cpu(kOp, "grad", grad);
  QuantizedWeight w(kOp, codes, scale, zero, row_scale, book, group, kind, k);
  Linear& a = w.a;
  STD_TORCH_CHECK(grad.dim() >= 1 && grad.size(grad.dim() - 1) == a.n, "bigkernels::", kOp,
                  ": grad does not have rows of ", a.n);
  a.type = a.out_type = type_of(grad);
  RowView rows(grad);
  Tensor out = empty_rows(kOp, grad, k);
  a.in = rows.rows, a.out = out.mutable_data_ptr();
  a.m = out.numel() / std::max<int64_t>(k, 1);
  if (a.m == 0 || k == 0) return out;
  if (a.n == 0) return torch::stable::zero_(out);
  linear_many(a, true);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CPU, m) {
  m.impl("quantized_linear_fwd", TORCH_BOX(&forward));
  m.impl("quantized_linear_bwd", TORCH_BOX(&backward));
}

}  // namespace bigkernels
