#include "embedding_rows.h"

#include <cmath>

namespace bigkernels {
namespace {

float fp8(uint8_t code) {  // e4m3fn
  const int exponent = code >> 3 & 15, fraction = code & 7;
  const float size = exponent == 15 && fraction == 7 ? NAN
                     : exponent                      ? std::ldexp(8.0f + fraction, exponent - 10)
                                                     : std::ldexp((float)fraction, -9);
  return code & 128 ? -size : size;
}

}  // namespace

void embedding_row(const Weight& w, int64_t n, float* out, std::vector<float>& scales) {
  if (is_blocks(w.kind)) return table().decode_row(w, n, out);
  const uint8_t* codes = w.codes + n * w.code_row;
  if (!w.group) {
    const float scale = ((const float*)w.scale)[n];
    for (int64_t k = 0; k < w.k; ++k) out[k] = (w.kind == Codes::fp8 ? fp8(codes[k]) : (float)(int8_t)codes[k]) * scale;
    return;
  }
  const int64_t groups = w.groups;
  scales.resize(2 * groups);
  float *scale = scales.data(), *zero = scale + groups;
  if (traits(w.kind).scale_bytes == 4)
    __builtin_memcpy(scale, (const float*)w.scale + n * groups, groups * 4);
  else
    table().convert(Type::f16, false, (const uint16_t*)w.scale + n * groups, scale, groups);
  if (w.zero) table().convert(Type::f16, false, w.zero + n * groups, zero, groups);
  const float row = w.row_scale ? w.row_scale[n] : 1.0f;
  for (int64_t k = 0; k < w.k; ++k) {
    const int64_t g = k / w.group;
    const int code = k % 2 ? codes[k / 2] >> 4 : codes[k / 2] & 15;
    switch (w.kind) {
      case Codes::int8g: out[k] = (float)(int8_t)codes[k] * scale[g]; break;
      case Codes::book4: out[k] = w.book[code] * scale[g]; break;
      case Codes::affine4m: out[k] = code * scale[g] + zero[g]; break;
      default: out[k] = (code - zero[g]) * scale[g] * row;
    }
  }
}

}  // namespace bigkernels
