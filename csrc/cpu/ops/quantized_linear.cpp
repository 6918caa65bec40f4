#include <algorithm>

#include "linear.h"

namespace bigkernels {
namespace {

constexpr const char* kOp = "quantized_linear";

// The weight and what its kernels read of it, without the tokens.
class Weight {
 public:
  Linear a{};

  Weight(const Tensor& codes, const Tensor& scale, const MaybeTensor& zero, const MaybeTensor& row_scale,
         const MaybeTensor& book, int64_t group, int64_t k)
      : codes_(last_contiguous(codes)),
        scale_(torch::stable::contiguous(scale)),
        row_scale_(kOp, "row_scale", row_scale, codes.size(0)),
        book_(kOp, "book", book, 16) {
    check_cpu(kOp, "codes", codes);
    check_cpu(kOp, "scale", scale);
    STD_TORCH_CHECK(codes.dim() == 2 && k >= 0, "bigkernels::", kOp, ": codes must be a matrix");
    ScalarType type = codes.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Char || type == ScalarType::Byte, "bigkernels::", kOp,
                    ": codes must be int8 or uint8");
    bool packed = type == ScalarType::Byte && group != 0;
    a.kind = type == ScalarType::Char ? Codes::int8 : !packed ? Codes::fp8 : book ? Codes::book4 : Codes::affine4;
    a.n = codes.size(0), a.k = k;
    STD_TORCH_CHECK(codes.size(1) == (packed ? (k + 1) / 2 : k), "bigkernels::", kOp, ": codes do not hold rows of ",
                    k);
    a.codes = (const uint8_t*)codes_.const_data_ptr(), a.code_row = codes_.stride(0);
    a.group = group, a.groups = group > 0 ? (k + group - 1) / group : 0;
    STD_TORCH_CHECK(packed ? group == 32 || group == 64 || group == 128 : group == 0, "bigkernels::", kOp,
                    ": groups of ", group);
    ScalarType wanted = a.kind == Codes::affine4 ? ScalarType::Half : ScalarType::Float;
    STD_TORCH_CHECK(scale.scalar_type() == wanted && scale.dim() == (packed ? 2 : 1) && scale.size(0) == a.n &&
                        (!packed || scale.size(1) == a.groups),
                    "bigkernels::", kOp, ": scale does not fit the codes");
    a.scale = scale_.const_data_ptr();
    STD_TORCH_CHECK(zero.has_value() == (a.kind == Codes::affine4) && row_scale.has_value() == zero.has_value() &&
                        book.has_value() == (a.kind == Codes::book4),
                    "bigkernels::", kOp, ": zero, row_scale and book do not fit the codes");
    if (zero) {
      check_like(kOp, "zero", *zero, scale);
      zero_ = torch::stable::contiguous(*zero);
      a.zero = (const uint16_t*)zero_.const_data_ptr();
    }
    a.row_scale = row_scale_.data(), a.book = book_.data();
  }

 private:
  Tensor codes_, scale_, zero_;
  VectorView row_scale_, book_;
};

constexpr int64_t kMostExact = 1 << 17;  // products of 8-bit integers whose sum 32 bits hold

void run_dynamic(const Linear& a) {
  const CpuTable& kernels = table();
  int64_t strip = kernels.linear_dynamic_strip(a);
  for_groups(
      a, a.n, strip,
      [&](const Linear& part, int64_t begin, int64_t end, char* left, float* scales) {
        Scratch token(kernels.linear_dynamic_token(part));
        kernels.linear_dynamic_pack(part, begin, end, left, scales, token.data());
      },
      [&](const Linear& part, const char* left, const float* scales, int64_t begin, int64_t end) {
        Scratch memory(kernels.linear_dynamic_workspace(part, kColumns));
        kernels.linear_dynamic(part, left, scales, begin, end, memory.data());
      });
}

Tensor forward(Tensor x, Tensor codes, Tensor scale, MaybeTensor zero, MaybeTensor row_scale, MaybeTensor book,
               MaybeTensor bias, int64_t group, int64_t k, bool dynamic) {
  check_cpu(kOp, "x", x);
  Weight w(codes, scale, zero, row_scale, book, group, k);
  Linear& a = w.a;
  STD_TORCH_CHECK(!dynamic || (a.kind == Codes::int8 && k <= kMostExact), "bigkernels::", kOp,
                  ": tokens are rounded for int8 codes alone, of rows of at most ", kMostExact);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == k, "bigkernels::", kOp, ": x does not have rows of ", k);
  a.type = a.out_type = type_of(x);
  VectorView added(kOp, "bias", bias, a.n);
  a.bias = added.data();
  RowView rows(x);
  Tensor out = empty_rows(kOp, x, a.n);
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

Tensor backward(Tensor grad, Tensor codes, Tensor scale, MaybeTensor zero, MaybeTensor row_scale, MaybeTensor book,
                int64_t group, int64_t k) {
  check_cpu(kOp, "grad", grad);
  Weight w(codes, scale, zero, row_scale, book, group, k);
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
