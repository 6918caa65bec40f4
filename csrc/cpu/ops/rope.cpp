#include <bigkernels/stable.h>

namespace bigkernels {
namespace {

constexpr int64_t kMaxRotary = 1024;  // as in the kernel and in bigkernels/ops/rope.py

// Like torch.empty_like: the input's strides where it is dense in some order of its dimensions, else contiguous.
Tensor empty_dense_like(const Tensor& x) {
  int64_t sizes[4], strides[4], dense = 1;
  for (int i = 0; i < 4; ++i) sizes[i] = x.size(i), strides[i] = x.stride(i);
  int order[4] = {3, 2, 1, 0};
  for (int i = 1; i < 4; ++i)  // insertion sort by stride, smallest first
    for (int j = i; j > 0 && strides[order[j]] < strides[order[j - 1]]; --j) std::swap(order[j], order[j - 1]);
  for (int i : order) {
    if (sizes[i] == 1) continue;
    if (strides[i] != dense) return empty_contiguous_like(x);
    dense *= sizes[i];
  }
  return empty_strided(sizes, strides, 4, x.scalar_type(), dense * size_of(type_of(x)));
}

Rope::Heads heads(const Tensor& in, const Tensor& out) {
  return {in.const_data_ptr(), out.mutable_data_ptr(), in.size(1),    in.stride(0), in.stride(1),
          in.stride(2),        out.stride(0),          out.stride(1), out.stride(2)};
}

std::tuple<Tensor, Tensor> rotate(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse) {
  check_cpu("rope", "q", q);
  check_cpu("rope", "k", k);
  check_cpu("rope", "cos", cos);
  check_cpu("rope", "sin", sin);
  STD_TORCH_CHECK(
      q.dim() == 4 && k.dim() == 4 && k.size(0) == q.size(0) && k.size(2) == q.size(2) && k.size(3) == q.size(3),
      "bigkernels::rope: q and k must be (B, H, S, D) with the same B, S and D");
  STD_TORCH_CHECK(cos.dim() == 3 && sin.dim() == 3, "bigkernels::rope: cos and sin must be (B or 1, S, R)");
  for (int i = 0; i < 3; ++i)
    STD_TORCH_CHECK(cos.size(i) == sin.size(i), "bigkernels::rope: cos and sin have different shapes");
  int64_t batch = q.size(0), length = q.size(2), d = q.size(3), rotary = cos.size(2);
  STD_TORCH_CHECK((cos.size(0) == 1 || cos.size(0) == batch) && cos.size(1) == length && rotary <= d &&
                      rotary % 2 == 0 && rotary <= kMaxRotary,
                  "bigkernels::rope: cos and sin do not fit q");
  Rope a;
  a.type = type_of(q);
  STD_TORCH_CHECK(type_of(k) == a.type, "bigkernels::rope: q and k have different dtypes");
  STD_TORCH_CHECK(cos.scalar_type() == sin.scalar_type(), "bigkernels::rope: cos and sin have different dtypes");
  if (cos.scalar_type() == ScalarType::Double) {
    cos = torch::stable::to(cos, ScalarType::Float);
    sin = torch::stable::to(sin, ScalarType::Float);
  }
  a.angle_type = type_of(cos);
  q = last_contiguous(q), k = last_contiguous(k), cos = last_contiguous(cos), sin = last_contiguous(sin);
  Tensor q_out = empty_dense_like(q), k_out = empty_dense_like(k);  // after that: the kernel writes whole heads
  a.q = heads(q, q_out), a.k = heads(k, k_out);
  a.cos = cos.const_data_ptr(), a.sin = sin.const_data_ptr();
  a.cos_batch = cos.size(0) == 1 ? 0 : cos.stride(0), a.cos_token = cos.stride(1);
  a.sin_batch = sin.size(0) == 1 ? 0 : sin.stride(0), a.sin_token = sin.stride(1);
  a.length = length, a.d = d, a.rotary = rotary;
  a.interleaved = interleaved, a.inverse = inverse;
  auto kernel = table().rope;
  parallel_rows(batch * length, 2 * (q.size(1) + k.size(1)) * d * size_of(a.type),
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
