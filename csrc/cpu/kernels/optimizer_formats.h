// How parameters, gradients and states are stored, each format as two loops between memory and a block of floats. What
// is float32 already is worked on where it is, so that it costs nothing; every other format goes through a buffer in
// the first-level cache, so that any algorithm (update.h) has any format.
#pragma once
#include <bigkernels/optimizer.h>
#include <bigkernels/update.h>
#include <bigkernels/vec.h>

namespace bigkernels {
namespace BK_ISA {
namespace {

constexpr int64_t kBlock = kStateBlock;

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

// A table of 8 floats, looked up by the low 3 bits of the index.
struct Table8 {
#if defined(__AVX512F__)
  __m512 values;
  BK_INLINE Table8 of(const float* t, float factor) {
    return {_mm512_mul_ps(_mm512_broadcast_f32x8(_mm256_loadu_ps(t)), _mm512_set1_ps(factor))};
  }
  __attribute__((always_inline)) vf operator[](vi i) const {
    return (vf)_mm512_permutexvar_ps((__m512i)i, values);  // of 16, both halves alike
  }
#elif defined(__AVX2__)
  __m256 values;
  BK_INLINE Table8 of(const float* t, float factor) {
    return {_mm256_mul_ps(_mm256_loadu_ps(t), _mm256_set1_ps(factor))};
  }
  __attribute__((always_inline)) vf operator[](vi i) const {
    return (vf)_mm256_permutevar8x32_ps(values, (__m256i)i);
  }
#else
  float values[8];
  BK_INLINE Table8 of(const float* t, float factor) {
    Table8 r;
    for (int i = 0; i < 8; ++i) r.values[i] = t[i] * factor;
    return r;
  }
  __attribute__((always_inline)) vf operator[](vi i) const {
    vf v = {};
    for (int j = 0; j < W; ++j) v[j] = values[i[j] & 7];
    return v;
  }
#endif
};

// ---- 8 bits ---------------------------------------------------------------------------------------------------------
//
// The dynamic tree code of Dettmers (2016, https://arxiv.org/abs/1511.04561), as 8-bit optimizers use it (Dettmers et
// al. 2022, https://arxiv.org/abs/2110.02861). The magnitude u has L bits, 7 beside a sign and 8 without. Where its
// leading one is, p, tells the decade, 10^(p - L + 1), and the p bits below count equal cells of [0.1, 1] in it; a code
// stands for the middle of its cell. Scaled so that the largest code is 1: then the largest value of a block is exact,
// and both signs have it.

template <int L>
struct Tree {
  float slope[8], offset[8];      // value = slope[p] u + offset[p]
  float inverse[8], shift[8];     // u = inverse[p] value + shift[p], rounded down
  float next[8];                  // where the decade after p begins
  float log_scale, log_offset;    // p from the bits of a value: at most one too low
  constexpr Tree() : slope(), offset(), inverse(), shift(), next(), log_scale(), log_offset() {
    double top = 1.0, cells = 1.0, decade = 1.0;
    for (int p = 1; p < L; ++p) cells *= 2, decade /= 10;
    top -= 0.45 / cells;
    cells = 1.0;
    for (int p = 0; p < L; ++p, cells *= 2, decade *= 10) {
      double width = 0.9 * decade / cells;
      slope[p] = (float)(width / top), offset[p] = (float)((0.5 * width - 0.8 * decade) / top);
      inverse[p] = (float)(top / width), shift[p] = (float)(0.8 * decade / width);
      next[p] = p + 1 < L ? (float)(decade / top) : 3e38f;
    }
    const double log10_2 = 0.301029995663981195;
    log_scale = (float)(log10_2 / 8388608.0);
    log_offset = (float)(L - 127 * log10_2 - 0.45 / 128 / 2.302585092994);
  }
};
constexpr Tree<7> kSigned;
constexpr Tree<8> kUnsigned;

// The exponent of u + 1/2 as a float is p; its low 3 bits are the place in the table.
template <int L>
BK_INLINE void rotated(const float* t, float* r) {
  for (int p = 0; p < 8; ++p) r[(127 + p) & 7] = p < L ? t[p] : 0.0f;
}

template <bool kSign>
void decode8(const uint8_t* codes, float scale, float* out, int64_t n) {
  constexpr int L = kSign ? 7 : 8;
  const Tree<L>& tree = *(const Tree<L>*)(kSign ? (const void*)&kSigned : (const void*)&kUnsigned);
  float slopes[8], offsets[8];
  rotated<L>(tree.slope, slopes), rotated<L>(tree.offset, offsets);
  // value = slope (u + 1/2) + offset - slope / 2
  for (int i = 0; i < 8; ++i) offsets[i] -= 0.5f * slopes[i];
  const Table8 slope = Table8::of(slopes, scale), offset = Table8::of(offsets, scale);
  for (int64_t i = 0; i < n; i += W) {
    vi code;
#if defined(__AVX512F__)
    __m128i bytes = _mm_loadu_si128((const __m128i*)(codes + i));
    code = (vi)(kSign ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
    __m128i bytes = _mm_loadl_epi64((const __m128i*)(codes + i));
    code = (vi)(kSign ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
    for (int j = 0; j < W; ++j) code[j] = kSign ? (int8_t)codes[i + j] : codes[i + j];
#endif
    vf u = to_float(kSign ? code & 0x7f : code) + 0.5f;
    vi p = (vi)((vu)u >> 23);
    vf value = u * slope[p] + offset[p];
    // Of u = 0 the exponent is that of p = 7: which there is none of beside a sign, and gives less than zero without.
    if (kSign)
      value = (vf)((vi)value | (code & (int32_t)0x80000000));
    else
      value = vmax(vf{}, value);
    write(out + i, value);
  }
}

// The scale of a block: its largest magnitude. Compared as integers, so that infinity and NaN win; values that have no
// reciprocal count as zero.
BK_INLINE float scale_of(const float* x, int64_t n) {
  vi largest[2] = {};
  for (int64_t i = 0; i < n; i += 2 * W) {
    largest[0] = vmax_int(largest[0], read<vi>(x + i) & 0x7fffffff);
    largest[1] = vmax_int(largest[1], read<vi>(x + i + W) & 0x7fffffff);
  }
  vi both = vmax_int(largest[0], largest[1]);
  int32_t bits = 0;
  for (int i = 0; i < W; ++i) bits = both[i] > bits ? both[i] : bits;
  float scale;
  __builtin_memcpy(&scale, &bits, 4);
  return bits < 0x00800000 ? 0.0f : scale;
}

// x: whole groups of 4 W floats, zero beyond the end.
template <bool kSign>
float encode8(const float* x, uint8_t* codes, int64_t n) {
  constexpr int L = kSign ? 7 : 8;
  const Tree<L>& tree = *(const Tree<L>*)(kSign ? (const void*)&kSigned : (const void*)&kUnsigned);
  float scale = scale_of(x, n), inverse_scale = scale > 0.0f ? 1.0f / scale : 0.0f;
  const Table8 inverse = Table8::of(tree.inverse, 1.0f), shift = Table8::of(tree.shift, 1.0f),
               next = Table8::of(tree.next, 1.0f);
  auto one = [&](vf v) {
    vf y = (kSign ? vabs(v) : v) * inverse_scale;
    vi p = to_int(vmax(to_float((vi)y) * tree.log_scale + tree.log_offset, vf{}));
    p = p - (vi)(y >= next[p]);
    vi u = to_int(y * inverse[p] + shift[p]);
    if (kSign) return u | ((vi)((vu)v >> 24) & 0x80);
    return u - (vi)((u == 0) & (v > 0.0f));  // a positive second moment never becomes zero: it is divided by
  };
  for (int64_t i = 0; i < n; i += 4 * W) {
    vi a = one(load(x + i)), b = one(load(x + i + W)), c = one(load(x + i + 2 * W)), d = one(load(x + i + 3 * W));
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)(codes + i), _mm512_cvtepi32_epi8((__m512i)a));
    _mm_storeu_si128((__m128i*)(codes + i + 16), _mm512_cvtepi32_epi8((__m512i)b));
    _mm_storeu_si128((__m128i*)(codes + i + 32), _mm512_cvtepi32_epi8((__m512i)c));
    _mm_storeu_si128((__m128i*)(codes + i + 48), _mm512_cvtepi32_epi8((__m512i)d));
#elif defined(__AVX2__)
    __m256i ab = _mm256_packus_epi32((__m256i)a, (__m256i)b), cd = _mm256_packus_epi32((__m256i)c, (__m256i)d);
    __m256i bytes = _mm256_packus_epi16(ab, cd);  // in each half, of each of the four
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i*)(codes + i), bytes);
#else
    vi all[4] = {a, b, c, d};
    for (int j = 0; j < 4 * W; ++j) codes[i + j] = (uint8_t)all[j / W][j % W];
#endif
  }
  return scale;
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

// Random words: `half` of the word of element e. Elements e and e + 16 share a word, so that one hash serves two.
struct Random {
  uint32_t key;
  Random(uint32_t key, int64_t element) : key(key ^ mix((uint32_t)(element >> 32))) {}
  __attribute__((always_inline)) vu words(int64_t element) const {  // a multiple of 32, plus less than 16
    vu lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    vu x = (lane + (uint32_t)element) ^ key;
    x = (x ^ (x >> 16)) * 0x21f0aaadu;
    x = (x ^ (x >> 15)) * 0xd35a2d97u;
    return x ^ (x >> 15);
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
