#include <bigkernels/stable.h>

namespace bigkernels {
namespace {

Rope::Heads heads(const Tensor& in, const Tensor& out) {
  return {in.const_data_ptr(), out.mutable_data_ptr(), in.size(1),    in.stride(0), in.stride(1),
          in.stride(2),        out.stride(0),          out.stride(1), out.stride(2)};
}

std::tuple<Tensor, Tensor> rotate(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse) {
  check_cpu("rope", "q", q);
  check_cpu("rope", "k", k);
  STD_TORCH_CHECK(
      q.dim() == 4 && k.dim() == 4 && k.size(0) == q.size(0) && k.size(2) == q.size(2) && k.size(3) == q.size(3),
      "bigkernels::rope: q and k must be (B, H, S, D) with the same B, S and D");
  Rope a;
  a.type = type_of(q);
  STD_TORCH_CHECK(type_of(k) == a.type, "bigkernels::rope: q and k have different dtypes");
  AngleView angles("rope", cos, sin, q, interleaved);
  a.angles = angles.angles;
  int64_t batch = q.size(0);
  a.length = q.size(2), a.d = q.size(3);
  a.inverse = inverse;
  q = last_contiguous(q), k = last_contiguous(k);
  Tensor q_out = empty_dense_like(q), k_out = empty_dense_like(k);  // after that: the kernel writes whole heads
  a.q = heads(q, q_out), a.k = heads(k, k_out);
  auto kernel = table().rope;
  parallel_rows(batch * a.length, 2 * (q.size(1) + k.size(1)) * a.d * size_of(a.type),
                [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return {q_out, k_out};
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved) {
  return rotate(q, k, cos, sin, interleaved, false);
}
// The rotation is orthogonal up to the angles' scale: its gradient is the transposed rotation.
std::tuple<Tensor, Tensor> backward(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin, bool interleaved) {
  return rotate(grad_q, grad_k, cos, sin, interleaved, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CPU, m) {
  m.impl("rope_fwd", TORCH_BOX(&forward));
  m.impl("rope_bwd", TORCH_BOX(&backward));
}

}  // namespace bigkernels
