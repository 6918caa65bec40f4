// The products of a few rows of q and 16 keys by AVX-512, where a head's elements fill vectors. Sums across a vector
// cost what its products do, for each row. So keys change places, once for all rows, among the four of a quarter of a
// vector, which needs no port that products need; sums are across four lanes then.
#pragma once
#include "decode_vectors.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define BK_QUARTERS 1

namespace bigkernels {
namespace BK_ISA {
namespace {

// In a register, once: the compiler would read it again for each instruction that can.
BK_INLINE __m512i kept(const char* p) {
  __m512i x = read<__m512i>(p);
  asm("" : "+v"(x));
  return x;
}

// 64 bytes of four keys: lane j of the quarters of x[i] is of key j, and has word i of the four of the quarter.
BK_INLINE void four_keys(const char* key, int64_t by, __m512i* x) {
  const __m512i a = kept(key), b = kept(key + by), c = kept(key + 2 * by), d = kept(key + 3 * by);
  const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
  const __m512i ab_high = _mm512_unpackhi_epi32(a, b), cd_high = _mm512_unpackhi_epi32(c, d);
  x[0] = _mm512_unpacklo_epi64(ab, cd), x[1] = _mm512_unpackhi_epi64(ab, cd);
  x[2] = _mm512_unpacklo_epi64(ab_high, cd_high), x[3] = _mm512_unpackhi_epi64(ab_high, cd_high);
}

// 64 bytes of q to go with them: word i of each quarter in all of its lanes.
BK_INLINE void spread(__m512i q, __m512i* to) {
  to[0] = _mm512_shuffle_epi32(q, (_MM_PERM_ENUM)0x00), to[1] = _mm512_shuffle_epi32(q, (_MM_PERM_ENUM)0x55);
  to[2] = _mm512_shuffle_epi32(q, (_MM_PERM_ENUM)0xaa), to[3] = _mm512_shuffle_epi32(q, (_MM_PERM_ENUM)0xff);
}

// Quarter i of the result is the sum of the quarters of x[i]; add of floats or of integers.
template <class V, class Add>
BK_INLINE V sums_of_quarters(const V* x, Add add) {
  auto both = [&](V a, V b, auto low, auto high) __attribute__((always_inline)) {
    return add((V)_mm512_shuffle_i32x4((__m512i)a, (__m512i)b, decltype(low)::value),
               (V)_mm512_shuffle_i32x4((__m512i)a, (__m512i)b, decltype(high)::value));
  };
  return both(both(x[0], x[1], Number<0x44>(), Number<0xee>()), both(x[2], x[3], Number<0x44>(), Number<0xee>()),
              Number<0x88>(), Number<0xdd>());
}

// Asks for lines [0, 8) of those of 8 keys that are part `s` of `of`: all of them, in the order of their addresses.
template <int kParts>
BK_INLINE void ask_eight(const char* ahead, int64_t by, int s) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) ask(ahead + (8 * s + i) / kParts * by + (8 * s + i) % kParts * kLine);
}

// Pairs of bfloat16, of heads of 32 kSteps elements.
template <int R, int kSteps>
struct PairRows {
  __m512i q[R][kSteps][4];

  PairRows(const bf16* rows, int64_t distance) {
    for (int r = 0; r < R; ++r)
      for (int s = 0; s < kSteps; ++s) spread(read<__m512i>(rows + r * distance + s * 32), q[r][s]);
  }

  // to[r]: of keys [from, from + 16).
  BK_INLINE void products(const PairRows& rows, const Line& keys, int64_t from, bool ahead, vf* to) {
    vf acc[R][4];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) acc[r][g] = vf{};
    const char* k = keys.first + from * keys.by;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {  // fours of keys at once: a row of q is read for two of them
#pragma GCC unroll 4
      for (int s = 0; s < kSteps; ++s) {
        if (ahead) ask_eight<kSteps>(keys.ahead + (from + 8 * half) * keys.by, keys.by, s);
#pragma GCC unroll 2
        for (int g = 2 * half; g < 2 * half + 2; ++g) {
          __m512i x[4];
          four_keys(k + 4 * g * keys.by + s * kLine, keys.by, x);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
              acc[r][g] = (vf)_mm512_dpbf16_ps((__m512)acc[r][g], (__m512bh)rows.q[r][s][i], (__m512bh)x[i]);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      to[r] = sums_of_quarters(acc[r], [](vf a, vf b) __attribute__((always_inline)) { return a + b; });
  }
};

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
#endif
