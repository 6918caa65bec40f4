// What weights are stored as: one row of traits a kind, the same as `KINDS` of bigkernels/ops/_codes.py.
#pragma once
#include <stdint.h>

namespace bigkernels {

// Numbers as they are, or codes; those of 4 bits lie two in a byte, the first in its low half.
enum class Codes : int {
  f32 = 0,
  bf16 = 1,
  f16 = 2,
  int8 = 3,
  fp8 = 4,
  affine4 = 5,
  book4 = 6,
  affine4m = 7,
  int8g = 8
};

// One kind:
//   int8, fp8  code * scale[n]
//   affine4    (code - zero[n, k / group]) * scale[n, k / group] * row_scale[n], scale and zero in float16
//   book4      book[code] * scale[n, k / group], scale in float32
//   affine4m   code * scale[n, k / group] + zero[n, k / group], both in float16: GGUF's Q4_1
//   int8g      code * scale[n, k / group], scale in float16: GGUF's Q8_0
struct CodesRow {
  const char* name;
  int bits;         // of a code
  bool is_signed;   // whether codes are int8, and not bytes
  int scale_bytes;  // of a scale: 2 float16, 4 float32, 0 there is none
  bool blocked;     // whether scales belong to `group` elements of a row, and not to a row
  bool zero;        // zero points or minima, in float16
  bool row_scale;
  int book;  // values of the codebook; 0: codes are numbers
};

constexpr CodesRow kCodes[] = {
    {"f32", 32, false, 0, false, false, false, 0},  {"bf16", 16, false, 0, false, false, false, 0},
    {"f16", 16, false, 0, false, false, false, 0},  {"int8", 8, true, 4, false, false, false, 0},
    {"fp8", 8, false, 4, false, false, false, 0},   {"affine4", 4, false, 2, true, true, true, 0},
    {"book4", 4, false, 4, true, false, false, 16}, {"affine4m", 4, false, 2, true, true, false, 0},
    {"int8g", 8, true, 2, true, false, false, 0},
};
constexpr int kKinds = sizeof(kCodes) / sizeof(kCodes[0]);

static constexpr const CodesRow& traits(Codes kind) { return kCodes[(int)kind]; }
static constexpr bool is_plain(Codes kind) { return traits(kind).scale_bytes == 0; }
static constexpr int64_t code_bytes(Codes kind, int64_t elements) { return elements * traits(kind).bits / 8; }

}  // namespace bigkernels
