#include "linear.h"

#include <algorithm>

namespace bigkernels {

Tensor empty_rows(const char* op, const Tensor& x, int64_t n, bool wide) {
  int64_t sizes[kMaxDim], strides[kMaxDim], stride = 1, dim = x.dim();
  STD_TORCH_CHECK(dim >= 1 && dim <= kMaxDim, "bigkernels::", op, ": x must have 1 to 16 dimensions");
  for (int64_t i = dim - 1; i >= 0; --i) {
    sizes[i] = i == dim - 1 ? n : x.size(i);
    strides[i] = stride;
    stride *= sizes[i];
  }
  ScalarType dtype = wide ? ScalarType::Float : x.scalar_type();
  return empty_strided(sizes, strides, dim, dtype, stride * size_of(type_of(dtype)));
}

void linear_few(const Linear& a) {
  const CpuTable& kernels = table();
  Scratch ready(kernels.linear_few_size(a));
  kernels.linear_few_prepare(a, ready.data());
  parallel_rows(a.n, a.code_row + a.groups * 4,
                [&](int64_t begin, int64_t end) { kernels.linear_few(a, ready.data(), begin, end); });
}

void linear_many(const Linear& a, bool backward) {
  const CpuTable& kernels = table();
  for_groups(
      a, backward ? a.k : a.n, kernels.linear_row_block_bytes(a, backward),
      [&](const Linear& part, int64_t begin, int64_t end, char* left, float*) {
        kernels.linear_pack_left(part, backward, begin, end, left);
      },
      [&](const Linear& part, const char* left, const float*, int64_t begin, int64_t end) {
        Scratch memory(kernels.linear_workspace(part, kColumns));
        kernels.linear_many(part, backward, left, begin, end, memory.data());
      });
}

static Codes plain_kind(const Tensor& t) {
  switch (type_of(t)) {
    case Type::bf16: return Codes::bf16;
    case Type::f16: return Codes::f16;
    default: return Codes::f32;
  }
}

// The rows of a matrix as the weight of a product.
void set_weight(Linear& a, const Rows& rows, const Tensor& like, int64_t n, int64_t k) {
  a.kind = plain_kind(like);
  a.codes = (const uint8_t*)rows.data, a.code_row = rows.stride * size_of(type_of(like));
  a.n = n, a.k = k;
}

namespace {

constexpr const char* kOp = "linear";

void check_rows(const char* name, const Tensor& t, int64_t elements) {
  check_cpu(kOp, name, t);
  STD_TORCH_CHECK(t.dim() >= 1 && t.size(t.dim() - 1) == elements, "bigkernels::", kOp, ": ", name,
                  " does not have rows of ", elements);
}

// The bytes of a weight (N, K) packed for x.
int64_t packed_bytes(const Linear& a) { return (a.n + 31) / 32 * table().linear_packed_row_block_bytes(a); }

Tensor forward(Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor packed, bool wide) {
  check_cpu(kOp, "weight", weight);
  STD_TORCH_CHECK(weight.dim() == 2, "bigkernels::", kOp, ": weight must be a matrix");
  check_rows("x", x, weight.size(1));
  Linear a{};
  RowView stored(weight), rows(x);
  set_weight(a, stored.rows, weight, weight.size(0), weight.size(1));
  a.in = rows.rows, a.type = type_of(x), a.out_type = wide ? Type::f32 : a.type;
  VectorView added(kOp, "bias", bias, a.n);
  a.bias = added.data();
  Tensor out = empty_rows(kOp, x, a.n, wide);
  a.out = out.mutable_data_ptr();
  a.m = out.numel() / std::max<int64_t>(a.n, 1);
  if (packed) {
    check_cpu(kOp, "packed", *packed);
    STD_TORCH_CHECK(
        packed->scalar_type() == ScalarType::Byte && packed->is_contiguous() && packed->numel() == packed_bytes(a),
        "bigkernels::", kOp, ": packed is of another weight");
    a.packed = packed->const_data_ptr();
  }
  if (a.m == 0 || a.n == 0) return out;
  if (a.k == 0) return bias ? torch::stable::copy_(out, *bias) : torch::stable::zero_(out);
  if (a.m <= table().linear_few_most(a)) {
    linear_few(a);
  } else {
    linear_many(a, false);
  }
  return out;
}

// What linear_many reads of a weight again and again, for tokens of a type.
Tensor pack(Tensor weight, ScalarType dtype) {
  check_cpu(kOp, "weight", weight);
  STD_TORCH_CHECK(weight.dim() == 2, "bigkernels::", kOp, ": weight must be a matrix");
  Linear a{};
  RowView stored(weight);
  set_weight(a, stored.rows, weight, weight.size(0), weight.size(1));
  a.type = type_of(dtype);
  int64_t bytes = packed_bytes(a), one = 1;
  Tensor out = empty_strided(&bytes, &one, 1, ScalarType::Byte, bytes);
  void* to = out.mutable_data_ptr();
  parallel_rows((a.n + 31) / 32, bytes * 32 / std::max<int64_t>(a.n, 1),
                [&](int64_t begin, int64_t end) { table().linear_pack_right(a, begin, end, to); });
  return out;
}

std::tuple<Tensor, Tensor> backward(Tensor grad, MaybeTensor x, Tensor weight, bool input) {
  check_cpu(kOp, "weight", weight);
  STD_TORCH_CHECK(weight.dim() == 2, "bigkernels::", kOp, ": weight must be a matrix");
  int64_t n = weight.size(0), k = weight.size(1);
  check_rows("grad", grad, n);
  RowView rows(grad);
  Linear a{};
  a.type = type_of(grad);
  a.in = rows.rows;
  Tensor dx = none(grad), dw = none(weight);
  if (input) {
    dx = empty_rows(kOp, grad, k);
    RowView stored(weight);
    set_weight(a, stored.rows, weight, n, k);
    a.out = dx.mutable_data_ptr(), a.out_type = a.type;
    a.m = dx.numel() / std::max<int64_t>(k, 1);
    if (n == 0) {
      torch::stable::zero_(dx);
    } else if (a.m > 0 && k > 0) {
      linear_many(a, true);
    }
  }
  if (x) {
    check_rows("x", *x, k);
    STD_TORCH_CHECK(x->scalar_type() == grad.scalar_type(), "bigkernels::", kOp, ": x and grad differ in dtype");
    STD_TORCH_CHECK(type_of(weight) == Type::f32 || type_of(weight) == a.type, "bigkernels::", kOp,
                    ": weight is neither float32 nor of the dtype of grad");
    dw = empty_rows(kOp, weight, k);
    RowView tokens(*x);
    int64_t m = grad.numel() / std::max<int64_t>(n, 1);
    STD_TORCH_CHECK(n == 0 || k == 0 || m == tokens.count, "bigkernels::", kOp, ": x and grad differ in tokens");
    set_weight(a, tokens.rows, *x, m, k);
    a.in_transposed = true, a.m = n;
    a.out = dw.mutable_data_ptr(), a.out_type = type_of(weight);
    if (m == 0) {
      torch::stable::zero_(dw);
    } else if (n > 0 && k > 0) {
      linear_many(a, true);
    }
  }
  return {dx, dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&forward));
  m.impl("linear_bwd", TORCH_BOX(&backward));
  m.impl("linear_pack", TORCH_BOX(&pack));
}

}  // namespace bigkernels
