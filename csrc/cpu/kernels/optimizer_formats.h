// How parameters, gradients and states are stored, each format as two loops between memory and a block of floats. What
// is float32 already is worked on where it is, so that it costs nothing; every other format goes through a buffer in
// the first-level cache, so that any algorithm (update.h) has any format.
#pragma once
#include <bigkernels/optimizer.h>
#include <bigkernels/update.h>
#include <bigkernels/vec.h>

#include "random.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

constexpr int64_t kBlock = kStateBlock;

#define BK_METHOD __attribute__((always_inline))

BK_INLINE vi vmax_int(vi a, vi b) {
#if defined(__AVX512F__)
  return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
  vi greater = a > b;
  return (a & greater) | (b & ~greater);
#endif
}

BK_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
BK_INLINE vi to_int(vf x) {  // towards zero
#if defined(__AVX512F__)
  return (vi)_mm512_cvttps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (vi)_mm256_cvttps_epi32((__m256)x);
#else
  return __builtin_convertvector(x, vi);
#endif
}

// ---- 8 bits ---------------------------------------------------------------------------------------------------------
//
// A dynamic code like the dynamic tree of Dettmers (2016, https://arxiv.org/abs/1511.04561) and of 8-bit optimizers
// (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861): where the leading one of a code's magnitude is tells the
// order of magnitude, and the bits below it share that out. Here an order of magnitude is four octaves instead of a
// decade, and shared out as floats are, so that the bits of a code as a float are a quarter of those of its value: no
// table, and a third of the operations. In effect codes are the fourth root of values. A step is 3 to 6 % of a value
// down to a sixteenth of the largest and 6 to 13 % down to a 256th, where the decimal tree has 1.4 to 14 % in the first
// decade and 2.8 to 28 % in the second.
//
// The magnitude u stands for u + 1/2; scaled so that the largest one stands for 1, the block's largest magnitude is
// exact. Beside a sign there are 127 magnitudes and a zero, without one 256 and none: what is divided by never gets
// zero.
template <bool kSign>
constexpr int32_t kFourth = (kSign ? 0x42ff0000 : 0x437f8000) - (0x3f800000 >> 2);  // of 127.5 or 255.5, and of 1
constexpr float kZeroCode = 0x1.08p-32f;  // what u = 0 would stand for beside a sign

template <bool kSign>
struct Decoder {
  const uint8_t* codes;
  vf scale;
  BK_METHOD Decoder(const uint8_t* codes, float scale) : codes(codes), scale(splat(scale)) {}
  BK_METHOD vf operator[](int64_t i) const {
    vi code;
#if defined(__AVX512F__)
    __m128i bytes = _mm_loadu_si128((const __m128i*)(codes + i));
    code = (vi)(kSign ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
    vi u = kSign ? (vi)_mm512_abs_epi32((__m512i)code) : code;
#elif defined(__AVX2__)
    __m128i bytes = _mm_loadl_epi64((const __m128i*)(codes + i));
    code = (vi)(kSign ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
    vi u = kSign ? (vi)_mm256_abs_epi32((__m256i)code) : code;
#else
    for (int j = 0; j < W; ++j) code[j] = kSign ? (int8_t)codes[i + j] : codes[i + j];
    vi u = kSign ? (code ^ (code >> 31)) - (code >> 31) : code;
#endif
    vf value = (vf)(((vi)(to_float(u) + 0.5f) - kFourth<kSign>) << 2);
    if (kSign) value = (vf)((vi)(value - kZeroCode) | (code & (int32_t)0x80000000));
    return value * scale;
  }
};

// The largest magnitude seen. Compared as integers, so that infinity and NaN win.
struct Largest {
  vi bits = {};
  BK_METHOD void see(vf x) { bits = vmax_int(bits, (vi)x & 0x7fffffff); }
  // As the scale of a block: what has no reciprocal counts as zero.
  BK_METHOD float scale() const {
    int32_t most = 0;
    for (int i = 0; i < W; ++i) most = bits[i] > most ? bits[i] : most;
    float scale;
    __builtin_memcpy(&scale, &most, 4);
    return most < 0x00800000 ? 0.0f : scale;
  }
};

// x: whole groups of 4 W floats.
template <bool kSign>
void encode8(const float* x, float scale, uint8_t* codes, int64_t n) {
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  auto one = [&](int64_t i) {
    vf y = load(x + i) * inverse;
    vi bits = kSign ? (vi)vabs(y) : (vi)y;
    vi u = to_int((vf)((vi)((vu)bits >> 2) + kFourth<kSign>));
    if (!kSign) return u;
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (vi)_mm256_sign_epi32((__m256i)u, (__m256i)y);
#else
    vi minus = (vi)y >> 31;
    return (vi)((vu)(u ^ minus) - (vu)minus);  // of what is not finite the code is whatever it is, and may wrap
#endif
  };
  for (int64_t i = 0; i < n; i += 4 * W) {
    vi a = one(i), b = one(i + W), c = one(i + 2 * W), d = one(i + 3 * W);
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)(codes + i), _mm512_cvtepi32_epi8((__m512i)a));
    _mm_storeu_si128((__m128i*)(codes + i + 16), _mm512_cvtepi32_epi8((__m512i)b));
    _mm_storeu_si128((__m128i*)(codes + i + 32), _mm512_cvtepi32_epi8((__m512i)c));
    _mm_storeu_si128((__m128i*)(codes + i + 48), _mm512_cvtepi32_epi8((__m512i)d));
#elif defined(__AVX2__)
    __m256i ab = _mm256_packs_epi32((__m256i)a, (__m256i)b), cd = _mm256_packs_epi32((__m256i)c, (__m256i)d);
    __m256i bytes = kSign ? _mm256_packs_epi16(ab, cd) : _mm256_packus_epi16(ab, cd);  // in each half, of all four
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i*)(codes + i), bytes);
#else
    vi all[4] = {a, b, c, d};
    for (int j = 0; j < 4 * W; ++j) codes[i + j] = (uint8_t)all[j / W][j % W];
#endif
  }
}

// ---- 16 bits --------------------------------------------------------------------------------------------------------

BK_INLINE void write_low_halves(uint16_t* out, vu a, vu b) {  // of 2 W words below 2^16
#if defined(__AVX512F__)
  write(out, _mm512_cvtepi32_epi16((__m512i)a));
  write(out + W, _mm512_cvtepi32_epi16((__m512i)b));
#elif defined(__AVX2__)
  write(out, _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)a, (__m256i)b), 0xd8));
#else
  write(out, __builtin_convertvector(a, vh));
  write(out + W, __builtin_convertvector(b, vh));
#endif
}

BK_INLINE vu where(vi mask, vu a, vu b) { return ((vu)mask & a) | (~(vu)mask & b); }
BK_INLINE vi not_finite(vu bits) { return (vi)((bits & 0x7f800000u) == 0x7f800000u); }

// vec.h's conversion may lose subnormal numbers, which a parameter may not.
BK_INLINE vu nearest_bf16(vf v) {
  vu u = (vu)v;
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return where((vi)(v != v), (u >> 16) | 0x40, rounded);
}

// Random words: `half` of the word of element e. Elements e and e + 16 share a word, so that one hash is enough for
// both.
struct Random {
  uint32_t key;
  Random(uint32_t key, int64_t element) : key(key ^ mix((uint32_t)(element >> 32))) {}
  BK_METHOD vu words(int64_t element) const {  // a multiple of 32, plus less than 16
    return random_words(key, element);
  }
};

BK_INLINE vu stochastic_bf16(vf v, vu random) {
  vu u = (vu)v;
  return where(not_finite(u), nearest_bf16(v), (u + random) >> 16);
}

// In whole units of the last place: 2^-24 where the result is subnormal, else what 13 bits of a float32 are.
BK_INLINE vf stochastic_f16(vf v, vu random) {
  vu u = (vu)v, sign = u & 0x80000000u;
  vf normal = (vf)((u + (random & 0x1fff)) & ~0x1fffu);
  vf units = vabs(v) * 0x1p24f + ((vf)((random << 7) | 0x3f800000u) - 1.0f);
  vf subnormal = (vf)((vu)(to_float(to_int(units)) * 0x1p-24f) | sign);
  vf r = select_less(vabs(v), splat(0x1p-14f), subnormal, normal);
  return (vf)where(not_finite(u), u, (vu)r);
}

// Two vectors side by side, rounded to nearest.
BK_INLINE void store_pair(float* out, vf a, vf b) { write(out, a), write(out + W, b); }
BK_INLINE void store_pair(bf16* out, vf a, vf b) { write_low_halves((uint16_t*)out, nearest_bf16(a), nearest_bf16(b)); }

template <class T>
BK_INLINE void widen_block(const void* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += W) write(out + i, load((const T*)in + i));
}

// 16-bit floats from `x`, which afterwards holds what was stored. n: a multiple of 2 W. `element`: of x[0].
void narrow_bf16(float* x, uint16_t* out, int64_t n, const OptimizerScalars& s, int64_t element) {
  if (s.rounding == (int)Rounding::stochastic) {
    const Random random(s.key, element);
    for (int64_t i = 0; i < n; i += 32)
      for (int64_t j = 0; j < 16; j += 2 * W > 16 ? 16 : 2 * W) {
        // Elements j.. and 16 + j.. of the group of 32: low and high halves of the same words.
        constexpr int kVectors = 2 * W > 16 ? 1 : 2;
        vu low[2], high[2];
        for (int k = 0; k < kVectors; ++k) {
          vu words = random.words(element + i + j + k * W);
          float* at = x + i + j + k * W;
          low[k] = stochastic_bf16(load(at), words & 0xffff);
          high[k] = stochastic_bf16(load(at + 16), words >> 16);
          write(at, low[k] << 16), write(at + 16, high[k] << 16);
        }
        if (kVectors == 1) {
          write_low_halves(out + i, low[0], high[0]);
        } else {
          write_low_halves(out + i + j, low[0], low[1]);
          write_low_halves(out + i + j + 16, high[0], high[1]);
        }
      }
    return;
  }
  for (int64_t i = 0; i < n; i += 2 * W) {
    vu a = nearest_bf16(load(x + i)), b = nearest_bf16(load(x + i + W));
    write_low_halves(out + i, a, b);
    write(x + i, a << 16), write(x + i + W, b << 16);
  }
}

void narrow_f16(float* x, f16* out, int64_t n, const OptimizerScalars& s, int64_t element) {
  const Random random(s.key, element);
  for (int64_t i = 0; i < n; i += 32)
    for (int64_t j = 0; j < 32; j += W) {
      vf v = load(x + i + j);
      if (s.rounding == (int)Rounding::stochastic) {
        vu words = random.words(element + i + j % 16);
        v = stochastic_f16(v, j < 16 ? words & 0xffff : words >> 16);
      }
      store(out + i + j, v);
      write(x + i + j, load(out + i + j));
    }
}

// A float32 in a bfloat16 and a 16-bit remainder: bits = (parameter << 16) + remainder. The parameter is rounded half
// up in magnitude and not to even, so that the remainder fits; NaN keeps no remainder.
BK_INLINE void join_block(const uint16_t* high, const int16_t* rest, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    vu bits = (vu)load((const bf16*)high + i);
    for (int j = 0; j < W; ++j) bits[j] += (uint32_t)(int32_t)rest[i + j];
    write(out + i, bits);
  }
}
BK_INLINE void split_block(const float* x, uint16_t* high, int16_t* rest, int64_t n) {
  for (int64_t i = 0; i < n; i += 2 * W) {
    vu h[2], r[2];
    for (int k = 0; k < 2; ++k) {
      vf v = load(x + i + k * W);
      vu u = where((vi)(v != v), ((vu)v | 0x400000) & 0xffff0000u, (vu)v);
      h[k] = (u + 0x8000) >> 16;
      r[k] = (u - (h[k] << 16)) & 0xffff;
    }
    write_low_halves(high + i, h[0], h[1]);
    write_low_halves((uint16_t*)rest + i, r[0], r[1]);
  }
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
