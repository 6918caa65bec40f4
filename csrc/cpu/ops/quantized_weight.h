#pragma once
#include "linear.h"

namespace bigkernels {

// The weight and what its kernels read of it, without the tokens.
class QuantizedWeight {
 public:
  Linear a{};

  QuantizedWeight(const char* op, const Tensor& codes, const MaybeTensor& scale, const MaybeTensor& zero,
                  const MaybeTensor& row_scale, const MaybeTensor& book, int64_t group, int64_t kind, int64_t k)
      : codes_(last_contiguous(codes)),
        row_scale_(op, "row_scale", row_scale, codes.size(0)),
        book_(op, "book", book, 16) {
    check_cpu(op, "codes", codes);
    // A row of codes has 1 bit a value at the least; beyond that the sizes below would overflow.
    STD_TORCH_CHECK(codes.dim() == 2 && k >= 0 && k / 8 <= codes.size(1), "bigkernels::", op,
                    ": codes must be a matrix with rows of ", k);
    STD_TORCH_CHECK(kind >= 0 && kind < kKinds && !is_plain((Codes)kind), "bigkernels::", op, ": no codes are of kind ",
                    kind);
    a.kind = (Codes)kind;
    const CodesRow& row = traits(a.kind);
    STD_TORCH_CHECK(codes.scalar_type() == (row.is_signed ? ScalarType::Char : ScalarType::Byte), "bigkernels::", op,
                    ": codes must be ", row.is_signed ? "int8" : "uint8", " for ", row.name);
    a.n = codes.size(0), a.k = k;
    const int64_t row_bytes = row.block ? code_bytes(a.kind, k) : (k * row.bits + 7) / 8;
    STD_TORCH_CHECK(codes.size(1) == row_bytes && (!row.block || k % row.block == 0), "bigkernels::", op,
                    ": codes do not hold rows of ", k);
    a.codes = (const uint8_t*)codes_.const_data_ptr(), a.code_row = codes_.stride(0);
    STD_TORCH_CHECK(row.blocked ? group == 32 || group == 64 || group == 128 : group == 0, "bigkernels::", op,
                    ": groups of ", group);
    a.group = group, a.groups = group > 0 ? (k + group - 1) / group : 0;
    STD_TORCH_CHECK(scale.has_value() == (row.scale_bytes > 0), "bigkernels::", op, ": scale does not fit the codes");
    if (scale) {
      check_cpu(op, "scale", *scale);
      STD_TORCH_CHECK(scale->scalar_type() == (row.scale_bytes == 2 ? ScalarType::Half : ScalarType::Float) &&
                          scale->dim() == (group ? 2 : 1) && scale->size(0) == a.n &&
                          (!group || scale->size(1) == a.groups),
                      "bigkernels::", op, ": scale does not fit the codes");
      scale_.emplace(torch::stable::contiguous(*scale));
      a.scale = scale_->const_data_ptr();
    }
    STD_TORCH_CHECK(
        zero.has_value() == row.zero && row_scale.has_value() == row.row_scale && book.has_value() == (row.book > 0),
        "bigkernels::", op, ": zero, row_scale and book do not fit the codes");
    if (zero) {
      check_like(op, "zero", *zero, *scale);
      zero_.emplace(torch::stable::contiguous(*zero));
      a.zero = (const uint16_t*)zero_->const_data_ptr();
    }
    a.row_scale = row_scale_.data(), a.book = book_.data();
  }

 private:
  Tensor codes_;
  MaybeTensor scale_, zero_;
  VectorView row_scale_, book_;
};
}  // namespace bigkernels
