#include <bigkernels/stable.h>

namespace bigkernels {
namespace {

// The moments and total: null where the caller does not want them.
Tensor normalise(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
                 double eps, Tensor* mean, Tensor* rstd, Tensor* total) {
  check_cpu("layer_norm", "x", x);
  STD_TORCH_CHECK(x.dim() > 0, "bigkernels::layer_norm: x has no dimensions");
  if (residual) check_like("layer_norm", "residual", *residual, x);
  LayerNorm a;
  a.type = type_of(x);
  RowView rows(x);
  VectorView w("layer_norm", "weight", weight, rows.d), b("layer_norm", "bias", bias, rows.d);
  Tensor y = empty_contiguous_like(x);
  std::optional<RowView> added;
  if (residual) {
    a.residual = added.emplace(*residual).rows;
    *total = empty_contiguous_like(x);
    a.total = total->mutable_data_ptr();
  }
  if (rstd) {
    *mean = empty_like_leading(x, x.dim() - 1, ScalarType::Float);
    *rstd = empty_like_leading(x, x.dim() - 1, ScalarType::Float);
    a.mean = (float*)mean->mutable_data_ptr(), a.rstd = (float*)rstd->mutable_data_ptr();
  }
  a.x = rows.rows;
  a.weight = w.data(), a.bias = b.data();
  a.out = y.mutable_data_ptr();
  a.d = rows.d, a.eps = (float)eps;
  int64_t row_bytes = rows.d * size_of(a.type);
  a.stream = worth_streaming(y, row_bytes, rows.count * row_bytes);
  auto kernel = table().layer_norm_fwd;
  parallel_rows(rows.count, 2 * row_bytes, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return y;
}

Tensor infer(Tensor x, MaybeTensor weight, MaybeTensor bias, double eps) {
  return normalise(x, weight, bias, std::nullopt, eps, nullptr, nullptr, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor x, MaybeTensor weight, MaybeTensor bias, MaybeTensor residual,
                                                   double eps) {
  Tensor mean, rstd, total;
  Tensor y = normalise(x, weight, bias, residual, eps, &mean, &rstd, &total);
  return {y, mean, rstd, residual ? total : none(x)};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, MaybeTensor weight, MaybeTensor bias, Tensor mean,
                                            Tensor rstd, MaybeTensor grad_total) {
  check_cpu("layer_norm", "x", x);
  check_like("layer_norm", "grad", grad, x);
  if (grad_total) check_like("layer_norm", "grad_total", *grad_total, x);
  LayerNorm a;
  a.type = type_of(x);
  RowView rows(x), grads(grad);
  VectorView w("layer_norm", "weight", weight, rows.d);
  for (const Tensor* t : {&mean, &rstd})
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->dim() == x.dim() - 1 && t->is_contiguous() &&
                        t->numel() >= rows.count,
                    "bigkernels::layer_norm: mean and rstd must be float32, one a row");
  Tensor dx = empty_contiguous_like(x);
  int64_t row_bytes = rows.d * size_of(a.type), blocks = block_count(rows.count, 3 * row_bytes);
  PartialSums dweight(x, weight, blocks, rows.d), dbias(x, bias, blocks, rows.d);
  std::optional<RowView> totals;
  if (grad_total) a.grad_total = totals.emplace(*grad_total).rows;
  a.x = rows.rows, a.grad = grads.rows;
  a.weight = w.data();
  a.out = dx.mutable_data_ptr();
  a.mean = (float*)mean.mutable_data_ptr(), a.rstd = (float*)rstd.mutable_data_ptr();
  a.dweight = dweight.sums(), a.dbias = dbias.sums();
  a.d = rows.d;
  a.stream = worth_streaming(dx, row_bytes, rows.count * row_bytes);
  auto kernel = table().layer_norm_bwd;
  parallel_blocks(blocks, rows.count, [&](int64_t b, int64_t begin, int64_t end) { kernel(a, begin, end, b); });
  return {dx, dweight.total(), dbias.total()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&infer));
  m.impl("layer_norm_fwd", TORCH_BOX(&forward));
  m.impl("layer_norm_bwd", TORCH_BOX(&backward));
}

}  // namespace bigkernels
