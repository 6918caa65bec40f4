// Codes as pairs of bfloat16, exactly and before their scale.
#pragma once
#include <bigkernels/program.h>

#include "linear_codes.h"

#if defined(__AVX512BF16__)
namespace bigkernels {
namespace BK_ISA {
namespace {

// Codes of float8_e4m3fn, each extended by its sign: bits 4 to 10 are the magnitude, and bit 15 the sign. Those below
// 2^-6, which are multiples of 2^-9, and what is not a number are rare enough for a branch.
BK_INLINE __m512i fp8_words(__m512i wide) {
  __m512i value = _mm512_add_epi16(_mm512_and_si512(wide, _mm512_set1_epi16((short)0x87f0)), _mm512_set1_epi16(0x3c00));
  const __m512i magnitude = _mm512_set1_epi16(0x07f0);
  __mmask32 subnormal = _mm512_testn_epi16_mask(wide, _mm512_set1_epi16(0x0780));
  __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(wide, magnitude), magnitude);
  if (__builtin_expect(subnormal | nan, 0)) {
    const __m512i small = _mm512_broadcast_i64x4(
        _mm256_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60, 0, 0, 0, 0, 0, 0, 0, 0));
    __m512i few = _mm512_permutexvar_epi16(_mm512_and_si512(_mm512_srli_epi16(wide, 4), _mm512_set1_epi16(7)), small);
    few = _mm512_or_si512(few, _mm512_and_si512(wide, _mm512_set1_epi16((short)0x8000)));
    value = _mm512_mask_mov_epi16(value, subnormal, few);
    value = _mm512_mask_mov_epi16(value, nan, _mm512_set1_epi16(0x7fc0));
  }
  return value;
}

// 32 bits of each lane hold the integer in their upper half; as bfloat16 it has no bits below.
BK_INLINE __m512i join_halves(__m512i low, __m512i high) { return _mm512_or_si512(_mm512_srli_epi32(low, 16), high); }

// 32 codes of 8 bits side by side.
template <Codes kKind>
BK_INLINE __m512i eight_bit_pairs(__m256i codes) {
  if constexpr (kKind == Codes::fp8) return fp8_words(_mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 4));
  // Of small integers float32 has nothing below its upper half.
  __m512i low = (__m512i)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
  __m512i high = (__m512i)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(low, read<__m512i>(kUpper), high);
}

// Four codes of 8 bits a lane, as two pairs a lane: codes 0 and 2, then 1 and 3.
template <Codes kKind>
BK_INLINE void split_bytes(__m512i codes, __m512i* w) {
  if constexpr (kKind == Codes::fp8) {
    w[0] = fp8_words(_mm512_srai_epi16(_mm512_slli_epi16(codes, 8), 4));
    w[1] = fp8_words(_mm512_srai_epi16(_mm512_and_si512(codes, _mm512_set1_epi16((short)0xff00)), 4));
  } else {
    __m512i each[4];
    for (int i = 0; i < 4; ++i)
      each[i] = (__m512i)_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(codes, 24 - 8 * i), 24));
    w[0] = join_halves(each[0], each[2]), w[1] = join_halves(each[1], each[3]);
  }
}

// The numbers that codes of 4 bits stand for before their scale, as bfloat16, twice: bit 4 of an index is a bit of the
// neighbouring code.
BK_INLINE __m512i code_table(const Weight& w) {
  alignas(64) float values[16];
  for (int i = 0; i < 16; ++i) values[i] = w.kind == Codes::book4 ? w.book[i] : (float)i;
  bf16 narrow[16];
  store(narrow, load(values));
  return _mm512_broadcast_i64x4(read<__m256i>(narrow));
}

// 64 bytes of 4-bit codes by a table. A word has four codes: w[j] has the j-th of each.
BK_INLINE void look_up_nibbles(__m512i codes, __m512i table, __m512i* w) {
  w[0] = _mm512_permutexvar_epi16(codes, table);
  w[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
  w[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), table);
  w[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), table);
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
#endif
