#include <bigkernels/stable.h>

namespace bigkernels {
namespace {

// rstd and total: null where the caller does not want them.
Tensor normalise(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& residual, double eps, double offset,
                 Tensor* rstd, Tensor* total) {
  check_cpu("rms_norm", "x", x);
  STD_TORCH_CHECK(x.dim() > 0, "bigkernels::rms_norm: x has no dimensions");
  if (residual) check_like("rms_norm", "residual", *residual, x);
  RmsNorm a;
  a.type = type_of(x);
  RowView rows(x);
  VectorView w("rms_norm", "weight", weight, rows.d, (float)offset);
  Tensor y = empty_contiguous_like(x);
  std::optional<RowView> added;
  if (residual) {
    a.residual = added.emplace(*residual).rows;
    *total = empty_contiguous_like(x);
    a.total = total->mutable_data_ptr();
  }
  if (rstd) {
    *rstd = empty_like_leading(x, x.dim() - 1, ScalarType::Float);
    a.rstd = (float*)rstd->mutable_data_ptr();
  }
  a.x = rows.rows;
  a.weight = w.data();
  a.out = y.mutable_data_ptr();
  a.d = rows.d, a.eps = (float)eps;
  int64_t row_bytes = rows.d * size_of(a.type);
  a.stream = worth_streaming(y, row_bytes, rows.count * row_bytes);
  auto kernel = table().rms_norm_fwd;
  parallel_rows(rows.count, 2 * row_bytes, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return y;
}

Tensor infer(Tensor x, MaybeTensor weight, double eps, double offset) {
  return normalise(x, weight, std::nullopt, eps, offset, nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, MaybeTensor weight, MaybeTensor residual, double eps,
                                           double offset) {
  Tensor rstd, total;
  Tensor y = normalise(x, weight, residual, eps, offset, &rstd, &total);
  return {y, rstd, residual ? total : none(x)};
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor x, MaybeTensor weight, Tensor rstd, MaybeTensor grad_total,
                                    double offset) {
  check_cpu("rms_norm", "x", x);
  check_like("rms_norm", "grad", grad, x);
  if (grad_total) check_like("rms_norm", "grad_total", *grad_total, x);
  RmsNorm a;
  a.type = type_of(x);
  RowView rows(x), grads(grad);
  VectorView w("rms_norm", "weight", weight, rows.d, (float)offset);
  STD_TORCH_CHECK(rstd.scalar_type() == ScalarType::Float && rstd.dim() == x.dim() - 1 && rstd.is_contiguous() &&
                      rstd.numel() >= rows.count,
                  "bigkernels::rms_norm: rstd must be float32, one a row");
  Tensor dx = empty_contiguous_like(x);
  int64_t row_bytes = rows.d * size_of(a.type), blocks = block_count(rows.count, 3 * row_bytes);
  PartialSums dweight(x, weight, blocks, rows.d);
  std::optional<RowView> totals;
  if (grad_total) a.grad_total = totals.emplace(*grad_total).rows;
  a.x = rows.rows, a.grad = grads.rows;
  a.weight = w.data();
  a.out = dx.mutable_data_ptr();
  a.rstd = (float*)rstd.mutable_data_ptr(), a.dweight = dweight.sums();
  a.d = rows.d;
  a.stream = worth_streaming(dx, row_bytes, rows.count * row_bytes);
  auto kernel = table().rms_norm_bwd;
  parallel_blocks(blocks, rows.count, [&](int64_t b, int64_t begin, int64_t end) { kernel(a, begin, end, b); });
  return {dx, dweight.total()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&infer));
  m.impl("rms_norm_fwd", TORCH_BOX(&forward));
  m.impl("rms_norm_bwd", TORCH_BOX(&backward));
}

}  // namespace bigkernels
