// From what a weight holds to numbers.
#pragma once
#include "blocks.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

constexpr bool is_packed(Codes kind) { return traits(kind).bits == 4 && !is_blocks(kind); }
BK_INLINE bool packed(const Weight& a) { return is_packed(a.kind); }

BK_INLINE bool plain(const Weight& a) { return is_plain(a.kind); }

// What plain weights of a type are marked with.
template <class T>
constexpr Codes plain_kind = Codes::f32;
template <>
constexpr Codes plain_kind<bf16> = Codes::bf16;
template <>
constexpr Codes plain_kind<f16> = Codes::f16;

BK_INLINE vi widen_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  vi v;
  for (int i = 0; i < W; ++i) v[i] = p[i];
  return v;
#endif
}

// float8_e4m3fn: the exponent is rebased by a multiplication, which also normalises the subnormal numbers.
BK_INLINE vf load_fp8(const uint8_t* p) {
#if defined(__AVX512F__)
  // Extended by its sign: bits 20 to 26 are the magnitude, and bit 31 the sign.
  __m512i code = _mm512_slli_epi32(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)), 20);
  __m512i magnitude = _mm512_and_epi32(code, _mm512_set1_epi32(0x07f00000));
  __m512i bits = _mm512_and_epi32(code, _mm512_set1_epi32((int)0x87f00000));
  __mmask16 nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x07f00000));
  __m512 value = _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p120f));
  return (vf)_mm512_mask_mov_ps(value, nan, _mm512_set1_ps(__builtin_nanf("")));
#else
  vi code = widen_bytes(p), magnitude = code & 0x7f;
  vf value = (vf)(magnitude << 20) * 0x1p120f;
  vi nan = (magnitude == 0x7f) & 0x7fc00000;
  return (vf)((vi)value | nan | ((code & 0x80) << 24));
#endif
}

// book[code] for codes of 4 bits; what is above them is not looked at.
BK_INLINE vf look_up(const float* book, vi code) {
#if defined(__AVX512F__)
  return (vf)_mm512_permutexvar_ps((__m512i)code, _mm512_loadu_ps(book));
#elif defined(__AVX2__)
  __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(book), (__m256i)code);
  __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(book + 8), (__m256i)code);
  return (vf)_mm256_blendv_ps(low, high, (__m256)(code << 28));
#else
  vf v;
  for (int i = 0; i < W; ++i) v[i] = book[code[i] & 15];
  return v;
#endif
}

// The values that the codes of 4 bits stand for in group g of row n.
BK_INLINE void group_values(const Weight& a, int64_t n, int64_t g, float* values) {
  if (a.kind == Codes::book4) {
    vf scale = splat(((const float*)a.scale)[n * a.groups + g]);
    for (int i = 0; i < 16; i += W) store(values + i, load(a.book + i) * scale);
    return;
  }
  int64_t at = n * a.groups + g;
  float scale = load_one((const f16*)a.scale + at), zero = load_one((const f16*)a.zero + at);
  vf code;
  for (int i = 0; i < W; ++i) code[i] = (float)i;
  if (a.kind == Codes::affine4m) {
    for (int i = 0; i < 16; i += W) store(values + i, (code + (float)i) * scale + zero);
    return;
  }
  scale *= a.row_scale[n];
  for (int i = 0; i < 16; i += W) store(values + i, (code + (float)i - zero) * scale);
}

template <class S, class T>
BK_INLINE void convert32(const S* from, int64_t count, T* to) {
  for (int i = 0; i < 32; i += W)
    store(to + i, count - i >= W ? load(from + i) : count > i ? load(from + i, count - i) : vf{});
}

// The 16 numbers that codes of 4 bits stand for, as T, and 32 codes decoded to them.
template <class T>
struct Values {
#if defined(__AVX512BF16__)
  __m512i twice;  // of 2 bytes: bit 4 of an index is a bit of the neighbouring code
#endif
  T each[16];

  Values(const Weight& a, int64_t n, int64_t g) {
    alignas(64) float values[16];
    group_values(a, n, g, values);
    for (int i = 0; i < 16; i += W) store(each + i, load(values + i));
#if defined(__AVX512BF16__)
    if (sizeof(T) == 2) twice = _mm512_broadcast_i64x4(read<__m256i>(each));
#endif
  }
  BK_INLINE void decode(const Values& v, const uint8_t* from, T* to) {
#if defined(__AVX512BF16__)
    __m512i codes = (__m512i)widen_bytes(from);
    if constexpr (sizeof(T) == 2) {
      write(to, _mm512_permutexvar_epi16(_mm512_or_epi32(codes, _mm512_slli_epi32(codes, 12)), v.twice));
    } else {
      __m512 even = (__m512)look_up((const float*)v.each, (vi)codes),
             odd = (__m512)look_up((const float*)v.each, (vi)_mm512_srli_epi32(codes, 4));
      const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      store((float*)to, (vf)_mm512_permutex2var_ps(even, low, odd));
      store((float*)to + 16, (vf)_mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd));
    }
#else
    for (int i = 0; i < 16; ++i) to[2 * i] = v.each[from[i] & 15], to[2 * i + 1] = v.each[from[i] >> 4];
#endif
  }
};

// Elements [k, k + span) of row n as T, zero from the row's end on; k and span are multiples of 32, and so are groups.
template <class T>
void decode_row(const Weight& a, int64_t n, int64_t k, int64_t span, T* to) {
  if (is_blocks(a.kind)) return decode_blocks(a, n, k, span, to);
  const uint8_t* row = a.codes + n * a.code_row;
  for (int64_t end = k + span; k < end;) {
    int64_t last = a.group ? (k / a.group + 1) * a.group : end;
    if (last > end) last = end;
    auto each = [&](auto f) __attribute__((always_inline)) {
      for (; k < last; k += 32, to += 32) f(row + code_bytes(a.kind, k), a.k - k);
    };
    if (k >= a.k) {
      __builtin_memset(to, 0, (end - k) * sizeof(T));
      return;
    }
    switch (a.kind) {
      case Codes::f32:
        each([&](const uint8_t* from, int64_t count) { convert32((const float*)from, count, to); });
        break;
      case Codes::bf16:
        each([&](const uint8_t* from, int64_t count) { convert32((const bf16*)from, count, to); });
        break;
      case Codes::f16: each([&](const uint8_t* from, int64_t count) { convert32((const f16*)from, count, to); }); break;
      case Codes::int8:
      case Codes::int8g:
      case Codes::fp8: {
        vf scale =
            splat(a.group ? load_one((const f16*)a.scale + n * a.groups + k / a.group) : ((const float*)a.scale)[n]);
        each([&](const uint8_t* from, int64_t count) __attribute__((always_inline)) {
          uint8_t part[32] = {};
          if (count < 32) {
            if (count > 0) __builtin_memcpy(part, from, count);
            from = part;
          }
          for (int i = 0; i < 32; i += W)
            store(to + i, (a.kind == Codes::fp8 ? load_fp8(from + i) : load((const int8_t*)from + i)) * scale);
        });
        break;
      }
      default: {
        Values<T> values(a, n, k / a.group);
        each([&](const uint8_t* from, int64_t count) __attribute__((always_inline)) {
          uint8_t part[16] = {};
          if (count < 32) {
            if (count > 0) __builtin_memcpy(part, from, (count + 1) / 2);
            from = part;
          }
          Values<T>::decode(values, from, to);
          for (int64_t i = count < 0 ? 0 : count; i < 32; ++i) to[i] = T{};
        });
      }
    }
  }
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
