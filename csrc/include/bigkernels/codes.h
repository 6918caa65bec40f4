// What weights are stored as: one row of traits a kind, the same as `KINDS` of bigkernels/ops/codes.py.
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
  int8g = 8,
  q5_0 = 9,
  q5_1 = 10,
  q2_k = 11,
  q3_k = 12,
  q4_k = 13,
  q5_k = 14,
  q6_k = 15,
  iq4_nl = 16,
  iq4_xs = 17,
  tq1_0 = 18,
  tq2_0 = 19
};

// One kind:
//   int8, fp8  code * scale[n]
//   affine4    (code - zero[n, k / group]) * scale[n, k / group] * row_scale[n], scale and zero in float16
//   book4      book[code] * scale[n, k / group], scale in float32
//   affine4m   code * scale[n, k / group] + zero[n, k / group], both in float16: GGUF's Q4_1
//   int8g      code * scale[n, k / group], scale in float16: GGUF's Q8_0
//   from q5_0 on  blocks of a GGUF file, in which codes and scales lie together (csrc/cpu/kernels/blocks.h)
struct CodesRow {
  const char* name;
  int bits;         // of a code, without what lies beside it
  bool is_signed;   // whether codes are int8, and not bytes
  int scale_bytes;  // of a scale: 2 float16, 4 float32, 0 there is none
  bool blocked;     // whether scales belong to `group` elements of a row, and not to a row
  bool zero;        // zero points or minima, in float16
  bool row_scale;
  int book;         // values of the codebook that comes with a weight; 0: codes are numbers, or the kind has its own
  int block;        // elements whose codes and scales lie together; 0: scales are apart
  int block_bytes;  // of so many elements
};

constexpr CodesRow kCodes[] = {
    {"f32", 32, false, 0, false, false, false, 0, 0, 0},
    {"bf16", 16, false, 0, false, false, false, 0, 0, 0},
    {"f16", 16, false, 0, false, false, false, 0, 0, 0},
    {"int8", 8, true, 4, false, false, false, 0, 0, 0},
    {"fp8", 8, false, 4, false, false, false, 0, 0, 0},
    {"affine4", 4, false, 2, true, true, true, 0, 0, 0},
    {"book4", 4, false, 4, true, false, false, 16, 0, 0},
    {"affine4m", 4, false, 2, true, true, false, 0, 0, 0},
    {"int8g", 8, true, 2, true, false, false, 0, 0, 0},
    {"gguf Q5_0", 5, false, 0, false, false, false, 0, 32, 22},
    {"gguf Q5_1", 5, false, 0, false, false, false, 0, 32, 24},
    {"gguf Q2_K", 2, false, 0, false, false, false, 0, 256, 84},
    {"gguf Q3_K", 3, false, 0, false, false, false, 0, 256, 110},
    {"gguf Q4_K", 4, false, 0, false, false, false, 0, 256, 144},
    {"gguf Q5_K", 5, false, 0, false, false, false, 0, 256, 176},
    {"gguf Q6_K", 6, false, 0, false, false, false, 0, 256, 210},
    {"gguf IQ4_NL", 4, false, 0, false, false, false, 0, 32, 18},
    {"gguf IQ4_XS", 4, false, 0, false, false, false, 0, 256, 136},
    {"gguf TQ1_0", 2, false, 0, false, false, false, 0, 256, 54},
    {"gguf TQ2_0", 2, false, 0, false, false, false, 0, 256, 66},
};
constexpr int kKinds = sizeof(kCodes) / sizeof(kCodes[0]);

static constexpr const CodesRow& traits(Codes kind) { return kCodes[(int)kind]; }
static constexpr bool is_blocks(Codes kind) { return traits(kind).block > 0; }
static constexpr bool is_plain(Codes kind) { return traits(kind).scale_bytes == 0 && !is_blocks(kind); }
// Of whole blocks, where codes lie in blocks.
static constexpr int64_t code_bytes(Codes kind, int64_t elements) {
  const CodesRow& row = traits(kind);
  return row.block ? elements / row.block * row.block_bytes : elements * row.bits / 8;
}

}  // namespace bigkernels
