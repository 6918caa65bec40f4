// The codes of a weight in the order of matrix fragments, and what makes halves of them: bigkernels/ops/_fragments.py
// puts them in this order. A word has what a lane multiplies in a step of 16: with 4 bits the four pairs of its
// fragment, with 8 bits two words do. Pairs are of neighbours along the depth, one in each half of a word.
#pragma once
#include <bigkernels/cuda.h>

#include "warps.cuh"

namespace bigkernels {
namespace cuda {
namespace {

constexpr int kRun = 128;               // of the depth: what lies together
constexpr int kSteps = kRun / 16;       // matrix steps in it
constexpr int kTableBytes = 256 * 128;  // of a table of pairs, once for each lane: no two of them meet in a bank

constexpr int bits_of(FewCode c) { return c == FewCode::int4 || c == FewCode::book4 ? 4 : 8; }
constexpr bool has_offset(FewOffset o) { return o != FewOffset::none; }

// A unit is 16 rows in a run: their codes, a lane's 16 bytes beside those of the next, then a word a group for each
// row, rows g and g + 8 side by side. Four units, of 64 rows, lie together; then comes the next run.
constexpr int code_bytes(FewCode c) { return 16 * kRun * bits_of(c) / 8; }
constexpr int scale_bytes(int group) { return group ? kRun / group * 16 * 4 : 0; }
constexpr int unit_bytes(FewCode c, int group) { return code_bytes(c) + scale_bytes(group); }

BK_DEVICE uint32_t both(uint32_t half) { return half | half << 16; }

// The fragment of one step: rows g and g + 8, then both with 8 further along the depth. `own`: this lane's column of
// the table.
template <FewCode kCode, Type kType>
BK_DEVICE Words4 decode(const uint32_t* w, SharedPlace own) {
  constexpr bool wide = kType == Type::bf16;  // in its range
  Words4 a;
  if constexpr (kCode == FewCode::int4) {
    // Or-ed into the last places of a power of two a code is added to it. 128 are taken off with the group's zero
    // point; the 1024 of float16 would cost its products too many of their places.
    if constexpr (wide) {
      BK_UNROLL
      for (int p = 0; p < 4; ++p) a.v[p] = and_or(w[0] >> 4 * p, both(0x000f), both(0x4300));
    } else {
      BK_UNROLL
      for (int p = 0; p < 4; p += 2) {
        const uint32_t x = w[0] >> 4 * p;
        a.v[p] = fma2<kType>(and_or(x, both(0x000f), both(0x6400)), both(0x3c00), both(0xe408));      // 1, -1032
        a.v[p + 1] = fma2<kType>(and_or(x, both(0x00f0), both(0x6400)), both(0x2c00), both(0xd480));  // 1/16, -72
      }
    }
  } else if constexpr (kCode == FewCode::book4) {
    // A byte is two codes.
    BK_UNROLL
    for (int p = 0; p < 4; ++p) a.v[p] = read_shared(own, byte_of(w[0], p) * 128);
  } else if constexpr (kCode == FewCode::int8) {
    BK_UNROLL
    for (int p = 0; p < 4; ++p) {
      const uint32_t x = p & 1 ? w[p / 2] >> 8 : w[p / 2];
      if constexpr (wide)  // 128 and seven bits, less 128 or 256
        a.v[p] =
            fma2<kType>(and_or(x, both(0x0080), both(0x4300)), both(0xbf80), and_or(x, both(0x007f), both(0x4300)));
      else
        a.v[p] =
            fma2<kType>(and_xor(x, both(0x00ff), both(0x6480)), both(0x3c00), both(0xe480));  // 1024 and 128 + code
    }
  } else {
    // Of the two codes of a half the first lies as bfloat16 has sign, exponent and mantissa, the second in what that
    // leaves. Their exponents are 120 less than they should be, which a product mends, of subnormal numbers too.
    BK_UNROLL
    for (int p = 0; p < 4; p += 2) {
      const uint32_t x = w[p / 2];
      if constexpr (wide) {
        a.v[p] = fma2<kType>(x & both(0x87f0), both(0x7b80), both(0x8000));
        const uint32_t second = and_or(x << 4, both(0x80f0), x >> 4 & both(0x0700));
        a.v[p + 1] = fma2<kType>(second, both(0x7b80), both(0x8000));
      } else {  // the exponents are 8 less: the row's factor mends that
        a.v[p] = and_or(x, both(0x8000), x << 3 & both(0x3f80));
        a.v[p + 1] = and_or(x << 4, both(0x8000), and_or(x << 7, both(0x0780), x >> 1 & both(0x3800)));
      }
    }
  }
  return a;
}

// What the factor of a row leaves to be multiplied with.
template <FewCode kCode, Type kType>
constexpr float kMend = kCode == FewCode::fp8 && kType == Type::f16 ? 256.0f : 1.0f;

// The value of a group is scale * (product + a * sum) + b * sum, where the product is with what `decode` returns.
struct GroupScale {
  float scale, a, b;
};
template <FewOffset kOffset, Type kType>
BK_DEVICE GroupScale group_scale(uint32_t word) {
  if constexpr (kOffset == FewOffset::none) return {as_float(word), 0.0f, 0.0f};
  constexpr float excess = kType == Type::bf16 ? -128.0f : 8.0f;  // less what `decode` adds to a code
  const float scale = half_to_float(word & 0xffff), other = half_to_float(word >> 16);
  if constexpr (kOffset == FewOffset::zero) return {scale, excess - other, 0.0f};
  return {scale, excess, other};
}

// Entry i of the table: the values of both codes of a byte.
template <Type kType>
BK_DEVICE uint32_t table_entry(const float* book, int i) {
  const float low = book[i & 15], high = book[i >> 4];
  if constexpr (kType == Type::bf16) return nearest_bf16(low) | nearest_bf16(high) << 16;
  return nearest_f16(low) | nearest_f16(high) << 16;
}

}  // namespace
}  // namespace cuda
}  // namespace bigkernels
