// The codes of a weight in the order of matrix fragments, and what makes halves of them: bigkernels/ops/_fragments.py
// puts them in this order. A word has what a lane multiplies in a step of 16: with 4 bits the four pairs of its
// fragment, with 8 bits two words do. Pairs are of neighbours along the depth, one in each half of a word.
//
// A code is decoded to a half whose bits are the code's own, with nothing added: in its last places it is the integer
// times the smallest subnormal number, which matrix units multiply exactly (Fasi et al., Numerical behavior of NVIDIA
// tensor cores, 2021). bfloat16's smallest number is 2^-133, so that tokens are multiplied with 2^64 before.
#pragma once
#include <bigkernels/cuda.h>

#include "warps.cuh"

namespace bigkernels {
namespace cuda {
namespace {

constexpr int kRun = 128;               // of the depth: what lies together
constexpr int kSteps = kRun / 16;       // matrix steps in it
constexpr int kFour = 64;               // rows of four units
constexpr int kTableBytes = 256 * 128;  // of a table of pairs, once for each lane: no two of them meet in a bank

constexpr int bits_of(FewCode c) { return c == FewCode::int4 || c == FewCode::book4 ? 4 : 8; }
constexpr int groups_of(int group) { return group ? kRun / group : 0; }  // in a run

// A unit is 16 rows in a run: their codes, a lane's 16 bytes beside those of the next, then the words of scales: of row
// g those of its groups, each beside that of row g + 8. Four units, of 64 rows, lie together; then comes the next run.
constexpr int code_bytes(FewCode c) { return 16 * kRun * bits_of(c) / 8; }
constexpr int scale_bytes(int group) { return groups_of(group) * 16 * 4; }
constexpr int unit_bytes(FewCode c, int group) { return code_bytes(c) + scale_bytes(group); }

BK_DEVICE uint32_t both(uint32_t half) { return half | half << 16; }

// What tokens are multiplied with before, as a pair; 0: with nothing.
template <FewCode kCode, Type kType>
constexpr uint32_t kLift = kType == Type::bf16 && kCode != FewCode::book4 ? 0x5f805f80u : 0u;

// What results are multiplied with for the powers of two in tokens and decoded codes.
template <FewCode kCode, Type kType>
constexpr float kMend = kCode == FewCode::book4 ? 1.0f
                        : kCode == FewCode::fp8 ? (kType == Type::bf16 ? 0x1p56f : 0x1p8f)
                                                : (kType == Type::bf16 ? 0x1p69f : 0x1p24f);
// What an integer code of 1 is decoded to.
template <Type kType>
constexpr float kOne = kType == Type::bf16 ? 0x1p-133f : 0x1p-24f;

// What was added to integer codes.
template <FewCode kCode>
constexpr float kAdded = kCode == FewCode::int8 ? 128.0f : 0.0f;

// A table of pairs by bytes of two codes. Entry e of it is of the byte that has the last bit of e first, so that one
// permutation of bytes makes an address: of `lanes`, the lane's place in an entry, four times.
template <Type kType>
BK_DEVICE uint32_t table_entry(const float* book, int e) {
  const int codes = e >> 1 | (e & 1) << 7;
  return pack2<kType>(book[codes & 15], book[codes >> 4]);
}
struct Table {
  SharedPlace first;
  uint32_t lanes;
};
BK_DEVICE void look_up(Words4& out, uint32_t codes, const Table& table) {
  const uint32_t low = and_or(codes, 0x80808080u, table.lanes), high = codes & 0x7f7f7f7fu;
  BK_UNROLL
  for (int p = 0; p < 4; ++p) out.v[p] = read_shared(table.first, two_bytes(low, high, p));
}

// The fragment of one step: rows g and g + 8, then both with 8 further along the depth. Of int4 rows g + 8 come out 16
// times as large (`kSixteen`); where they should not, it takes two instructions more.
template <FewCode kCode, Type kType, bool kSixteen>
BK_DEVICE Words4 decode(const uint32_t* w, const Table& table) {
  Words4 a;
  if constexpr (kCode == FewCode::int4) {
    BK_UNROLL
    for (int p = 0; p < 4; p += 2) {
      const uint32_t x = w[0] >> 4 * p;
      a.v[p] = x & both(0x000f);
      a.v[p + 1] = kSixteen ? x & both(0x00f0) : x >> 4 & both(0x000f);
    }
  } else if constexpr (kCode == FewCode::book4) {
    look_up(a, w[0], table);
  } else if constexpr (kCode == FewCode::int8) {
    BK_UNROLL
    for (int p = 0; p < 4; ++p) a.v[p] = wide_bytes(w[p / 2], p & 1);
  } else {
    // Of the two codes of a half the first lies as bfloat16 has sign, exponent and mantissa, the second in what that
    // leaves. Their exponents are 120 less than they should be, in float16 8 less.
    BK_UNROLL
    for (int p = 0; p < 4; p += 2) {
      const uint32_t x = w[p / 2];
      if constexpr (kType == Type::bf16) {
        a.v[p] = x & both(0x87f0);
        a.v[p + 1] = and_or(x << 4, both(0x80f0), x >> 4 & both(0x0700));
      } else {
        a.v[p] = and_or(x, both(0x8000), x << 3 & both(0x3f80));
        a.v[p + 1] = and_or(x << 4, both(0x8000), and_or(x << 7, both(0x0780), x >> 1 & both(0x3800)));
      }
    }
  }
  return a;
}

// The value of a group is scale * (product + a * sum) + b * sum, where the product is with what `decode` returns, and
// the sum with codes of 1.
struct GroupScale {
  float scale, a, b;
};
template <FewCode kCode, FewOffset kOffset>
struct Offsets {
  static constexpr bool kA = kOffset == FewOffset::zero || kCode == FewCode::int8, kB = kOffset == FewOffset::minimum;
};
template <FewCode kCode, FewOffset kOffset>
BK_DEVICE GroupScale group_scale(uint32_t word) {
  if constexpr (kOffset == FewOffset::none) return {as_float(word), -kAdded<kCode>, 0.0f};
  const float scale = half_to_float(word & 0xffff), other = half_to_float(word >> 16);
  if constexpr (kOffset == FewOffset::zero) return {scale, -other, 0.0f};
  return {scale, 0.0f, other};
}

// ---- the same transposed --------------------------------------------------------------------------------------------

// Of a step's codes the rows become the depth: each half of a word has what lies at one place along the depth in rows
// g and g + 8, so that matrices of halves are transposed before they are decoded, a word at a time. Of codes by a table
// it is what lies at two places in each of these rows: their pairs have to be put together anew.
template <FewCode kCode, Type kType, int kTiles>
BK_HOT void transpose(PerLane<Few<uint32_t, kTiles>>& words) {
  BK_UNROLL
  for (int i = 0; i < kTiles; ++i) {
    PerLane<uint32_t> one;
    for_lanes([&](int lane) { one[lane] = words[lane].v[i]; });
    transpose_matrix(one);
    for_lanes([&](int lane) {
      const uint32_t x = one[lane];
      words[lane].v[i] = kCode == FewCode::book4 ? choose(0x0f0f0000u, x << 12, choose(0xf0f00f0fu, x, x >> 12)) : x;
    });
  }
}

// The fragment of the transposed codes: what were rows g and g + 8 are the depth now.
template <FewCode kCode, Type kType>
BK_DEVICE Words4 decode_transposed(const uint32_t* w, const Table& table) {
  const Words4 a = decode<kCode, kType, false>(w, table);
  return {{a.v[0], a.v[2], a.v[1], a.v[3]}};
}

// Where along the depth row g (g + 8 for half 1) of that fragment was, in a step.
template <FewCode kCode>
BK_DEVICE int transposed_row(int g, int half) {
  return kCode == FewCode::book4 ? g / 2 * 2 + g % 2 * 8 + half : g + 8 * half;
}

}  // namespace
}  // namespace cuda
}  // namespace bigkernels
