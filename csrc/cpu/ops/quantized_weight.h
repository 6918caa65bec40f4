#pragma once
#include "linear.h"

namespace bigkernels {

// The weight and what its kernels read of it, without the tokens.
class QuantizedWeight {
 public:
  Linear a{};

  QuantizedWeight(const char* op, const Tensor& codes, const Tensor& scale, const MaybeTensor& zero,
                  const MaybeTensor& row_scale, const MaybeTensor& book, int64_t group, int64_t k)
      : codes_(last_contiguous(codes)),
        scale_(torch::stable::contiguous(scale)),
        row_scale_(op, "row_scale", row_scale, codes.size(0)),
        book_(op, "book", book, 16) {
    check_cpu(op, "codes", codes);
    check_cpu(op, "scale", scale);
    STD_TORCH_CHECK(codes.dim() == 2 && k >= 0, "bigkernels::", op, ": codes must be a matrix");
    ScalarType type = codes.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Char || type == ScalarType::Byte, "bigkernels::", op,
                    ": codes must be int8 or uint8");
    bool packed = type == ScalarType::Byte && group != 0;
    if (packed) {
      a.kind = book ? Codes::book4 : row_scale ? Codes::affine4 : Codes::affine4m;
    } else if (type == ScalarType::Byte) {
      a.kind = Codes::fp8;
    } else {
      a.kind = group != 0 ? Codes::int8g : Codes::int8;
    }
    a.n = codes.size(0), a.k = k;
    STD_TORCH_CHECK(codes.size(1) == (packed ? (k + 1) / 2 : k), "bigkernels::", op, ": codes do not hold rows of ", k);
    a.codes = (const uint8_t*)codes_.const_data_ptr(), a.code_row = codes_.stride(0);
    a.group = group, a.groups = group > 0 ? (k + group - 1) / group : 0;
    STD_TORCH_CHECK(group == 0 || group == 32 || group == 64 || group == 128, "bigkernels::", op, ": groups of ",
                    group);
    ScalarType wanted = group != 0 && a.kind != Codes::book4 ? ScalarType::Half : ScalarType::Float;
    STD_TORCH_CHECK(scale.scalar_type() == wanted && scale.dim() == (group ? 2 : 1) && scale.size(0) == a.n &&
                        (!group || scale.size(1) == a.groups),
                    "bigkernels::", op, ": scale does not fit the codes");
    a.scale = scale_.const_data_ptr();
    STD_TORCH_CHECK(zero.has_value() == (a.kind == Codes::affine4 || a.kind == Codes::affine4m) &&
                        row_scale.has_value() == (a.kind == Codes::affine4) &&
                        book.has_value() == (a.kind == Codes::book4),
                    "bigkernels::", op, ": zero, row_scale and book do not fit the codes");
    if (zero) {
      check_like(op, "zero", *zero, scale);
      zero_ = torch::stable::contiguous(*zero);
      a.zero = (const uint16_t*)zero_.const_data_ptr();
    }
    a.row_scale = row_scale_.data(), a.book = book_.data();
  }

 private:
  Tensor codes_, scale_, zero_;
  VectorView row_scale_, book_;
};
}  // namespace bigkernels
