// One to three tokens: along the rows of the weight, each read once, in its order. The sums over a vector's lanes are
// taken for 16 rows at once.
//
// A token's result does not depend on how many of the others there are, nor on where a call's rows begin.
#pragma once
#include "product_tokens.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

// a * b + c, rounded once where there is an instruction for it: the compiler's own choice differs from place to place,
// and results must not.
BK_INLINE vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The lanes of 16 rows' sums, for T tokens, and where they go.
template <int T>
struct Sums {
  vf lanes[T][16];
  float* out;
  int64_t stride, begin;

  Sums(float* to, int64_t step, int64_t first) : out(to), stride(step), begin(first) {}

  BK_INLINE void flush(const Sums& s, int64_t n, int64_t rows) {
    for (int t = 0; t < T; ++t) {
      float* to = s.out + t * s.stride + n - s.begin;
#if defined(__AVX512F__)
      alignas(64) float turned[16][16];
      transpose16(s.lanes[t], 64, turned, 64);
      vf all[16];
      for (int i = 0; i < 16; ++i) all[i] = load(turned[i]);
      for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; ++i) all[i] += all[i + step];
      rows == 16 ? store(to, all[0]) : store(to, all[0], rows);
#else
      for (int64_t i = 0; i < rows; ++i) to[i] = sum(s.lanes[t][i]);
#endif
    }
  }
};

// row(n, lanes): the lanes of row n for each token.
template <int T, class Row>
BK_INLINE void for_rows(int64_t begin, int64_t end, float* out, int64_t stride, Row row) {
  Sums<T> sums(out, stride, begin);
  for (int64_t n = begin; n < end; n += 16) {
    int64_t rows = end - n < 16 ? end - n : 16;
    for (int64_t i = 0; i < rows; ++i) {
      vf lanes[T];
      row(n + i, lanes);
      for (int t = 0; t < T; ++t) sums.lanes[t][i] = lanes[t];
    }
    for (int64_t i = rows; i < 16; ++i)
      for (int t = 0; t < T; ++t) sums.lanes[t][i] = vf{};
    Sums<T>::flush(sums, n, rows);
  }
}

// ---- integers -------------------------------------------------------------------------------------------------------

typedef uint8_t vq __attribute__((vector_size(W * 4)));
typedef uint16_t vw __attribute__((vector_size(W * 4)));

// acc + the sums of four products a lane; u < 128 where there is no vpdpbusd.
BK_INLINE vi dot(vi acc, vq u, vq s) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)u, (__m512i)s);
#elif defined(__AVX2__)
  return acc + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)u, (__m256i)s), _mm256_set1_epi16(1));
#elif defined(__x86_64__)
  return acc + (vi)_mm_madd_epi16(_mm_maddubs_epi16((__m128i)u, (__m128i)s), _mm_set1_epi16(1));
#else
  for (int i = 0; i < 4 * W; ++i) acc[i / 4] += (int)u[i] * (int8_t)s[i];
  return acc;
#endif
}

// The same for codes with a sign. The instruction takes one operand without: codes + kOffset, which the tokens' sums
// make up for; others take their magnitude, and give the sign to the tokens.
#if defined(__AVX512VNNI__)
constexpr int kOffset = 128;
BK_INLINE vi dot_signed(vi acc, vq code, vq s) { return dot(acc, code ^ 0x80, s); }
#else
constexpr int kOffset = 0;
BK_INLINE vi dot_signed(vi acc, vq code, vq s) {
#if defined(__AVX2__)
  return dot(acc, (vq)_mm256_abs_epi8((__m256i)code), (vq)_mm256_sign_epi8((__m256i)s, (__m256i)code));
#elif defined(__x86_64__)
  return dot(acc, (vq)_mm_abs_epi8((__m128i)code), (vq)_mm_sign_epi8((__m128i)s, (__m128i)code));
#else
  for (int i = 0; i < 4 * W; ++i) acc[i / 4] += (int)(int8_t)code[i] * (int8_t)s[i];
  return acc;
#endif
}
#endif

BK_INLINE vf to_floats(vi v) { return __builtin_convertvector(v, vf); }

// v[index[i]] in lane i.
BK_INLINE vf pick_lanes(vf v, vi index) {
#if defined(__AVX512F__)
  return (vf)_mm512_permutexvar_ps((__m512i)index, (__m512)v);
#elif defined(__AVX2__)
  return (vf)_mm256_permutevar8x32_ps((__m256)v, (__m256i)index);
#else
  vf r;
  for (int i = 0; i < W; ++i) r[i] = v[index[i]];
  return r;
#endif
}

// Of each lane i of vector v: i * each + v * from.
BK_INLINE vi lane_numbers(int shift, int from) {
  vi r;
  for (int i = 0; i < W; ++i) r[i] = (i + from) >> shift;
  return r;
}

// `count` of float16 from p on, and zeros.
BK_INLINE vf load_some(const f16* p, int64_t count) {
#if defined(__AVX512F__)
  __mmask16 some = count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1);
  return (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, p));
#else
  return count >= W ? load(p) : load(p, count > 0 ? count : 0);
#endif
}

// The first `count` bytes of a vector, and zeros.
BK_INLINE vq read_some(const uint8_t* p, int64_t count) {
  if (count >= 4 * W) return read<vq>(p);
#if defined(__AVX512F__)
  return (vq)_mm512_maskz_loadu_epi8(~(__mmask64)0 >> (64 - count), p);
#else
  vq v{};
  __builtin_memcpy(&v, p, count);
  return v;
#endif
}

// What becomes of codes, for integers: how many a byte has, and what of a group comes beside its scale.
template <Codes kKind>
struct Coded {
  static constexpr bool kPacked = is_packed(kKind), kGrouped = kKind != Codes::int8;
  static constexpr int kVectors = kPacked ? 4 : 8;            // that W blocks of 32 codes fill
  static constexpr int64_t kCodes = kPacked ? 8 * W : 4 * W;  // of a vector
  static constexpr int kShift = kPacked ? 2 : 3;              // lanes a block: 4 or 8
  static constexpr bool kSummed = kKind == Codes::affine4 || kKind == Codes::affine4m || kOffset != 0;

  // What a token's sum over a group counts by.
  BK_INLINE vf beside(const Weight& w, int64_t at, int64_t count) {
    if constexpr (kKind == Codes::affine4m) return load_some((const f16*)w.zero + at, count);
    vf scale = load_some((const f16*)w.scale + at, count);
    if constexpr (kKind == Codes::affine4) return -(scale * load_some((const f16*)w.zero + at, count));
    return scale * -(float)kOffset;
  }
};

// kBlocks: blocks of 32 in a group of the weight.
template <Codes kKind, int kBlocks, int T>
void integer_rows(const Weight& w, const Tokens& a, const void* ready, int64_t begin, int64_t end, float* out,
                  int64_t stride) {
  typedef Coded<kKind> C;
  const uint8_t* x[T];
  const float *scales[T], *sums[T];
  for (int t = 0; t < T; ++t) {
    const char* block = a.block(ready, t);
    x[t] = (const uint8_t*)block, scales[t] = a.scales(block), sums[t] = a.sums_of(block);
  }
  const vi spread = lane_numbers(kBlocks == 4 ? 2 : kBlocks - 1, 0);
  vi lanes[C::kVectors];
  for (int v = 0; v < C::kVectors; ++v) lanes[v] = lane_numbers(C::kShift, v * W);
  constexpr int64_t kCodes = C::kCodes, kBytes = 4 * W;
  for_rows<T>(begin, end, out, stride, [&](int64_t n, vf* total) __attribute__((always_inline)) {
    const uint8_t* row = w.codes + n * w.code_row;
    const int64_t group = n * w.groups;
    for (int t = 0; t < T; ++t) total[t] = vf{};
    int64_t k = 0, g = 0;
    auto vector = [&](vq codes, int64_t at, vi pick, const vf* scale) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const uint8_t* from = x[t] + at;
        vi products;
        if constexpr (C::kPacked) {
          products = dot(vi{}, codes & 15, read<vq>(from));
          products = dot(products, (vq)((vw)codes >> 4) & 15, read<vq>(from + 4 * W));
        } else {
          products = dot_signed(vi{}, codes, read<vq>(from));
        }
        total[t] = multiply_add(to_floats(products), pick_lanes(scale[t], pick), total[t]);
      }
    };
    auto block_scales = [&](int64_t count, vf* scale) __attribute__((always_inline)) {
      vf own = splat(1);
      if constexpr (C::kGrouped) {
        own = load_some((const f16*)w.scale + group + g, count);
        if (kBlocks > 1) own = pick_lanes(own, spread);
      }
      for (int t = 0; t < T; ++t) {
        scale[t] = load(scales[t] + k / 32);
        if (C::kGrouped) scale[t] *= own;
      }
    };
    vf scale[T];
    for (; k + 32 * W <= w.k; k += 32 * W, g += W / kBlocks, row += C::kVectors * kBytes) {
      block_scales(W / kBlocks, scale);
#pragma GCC unroll 8
      for (int v = 0; v < C::kVectors; ++v) vector(read<vq>(row + v * kBytes), k + v * kCodes, lanes[v], scale);
    }
    if (k < w.k) {
      block_scales(w.groups - g < W / kBlocks ? w.groups - g : W / kBlocks, scale);
      int64_t left = C::kPacked ? (w.k - k + 1) / 2 : w.k - k;
      for (int v = 0; left > 0; ++v, left -= kBytes) {
        vector(read_some(row + v * kBytes, left), k + v * kCodes, lanes[v], scale);
      }
    }
    if constexpr (C::kGrouped && C::kSummed)
      for (g = 0; g < w.groups; g += W) {
        vf beside = C::beside(w, group + g, w.groups - g);
        for (int t = 0; t < T; ++t) total[t] = multiply_add(beside, load(sums[t] + g), total[t]);
      }
    if constexpr (kKind == Codes::int8)
      for (int t = 0; t < T; ++t) {
        if (C::kSummed) total[t][0] -= kOffset * sums[t][0];
        total[t] *= ((const float*)w.scale)[n];
      }
    if constexpr (kKind == Codes::affine4)
      for (int t = 0; t < T; ++t) total[t] *= w.row_scale[n];
  });
}

// ---- float32 --------------------------------------------------------------------------------------------------------

// The codes or numbers of a row from an element on, as vectors, before their scale.
template <Codes kKind>
struct Numbers {
  static constexpr bool kPacked = is_packed(kKind), kScaled = kKind > Codes::f16;
  static constexpr int kVectors = kPacked ? 2 : 1, kStep = kVectors * W;

  static constexpr int64_t bytes(int64_t elements) {
    return kPacked ? (elements + 1) / 2 : kKind == Codes::f32 ? 4 * elements : kScaled ? elements : 2 * elements;
  }
  BK_INLINE void read(const uint8_t* codes, const float* book, vf* v) {
    if constexpr (kKind == Codes::f32) v[0] = load((const float*)codes);
    if constexpr (kKind == Codes::bf16) v[0] = load((const bf16*)codes);
    if constexpr (kKind == Codes::f16) v[0] = load((const f16*)codes);
    if constexpr (kKind == Codes::int8 || kKind == Codes::int8g) v[0] = load((const int8_t*)codes);
    if constexpr (kKind == Codes::fp8) v[0] = load_fp8(codes);
    if constexpr (kPacked) {
      vi both = widen_bytes(codes), high = (vi)((vu)both >> 4);
      if constexpr (kKind == Codes::book4) {
        v[0] = look_up(book, both), v[1] = look_up(book, high);
      } else {
        v[0] = __builtin_convertvector(both & 15, vf), v[1] = __builtin_convertvector(high, vf);
      }
    }
  }
};

template <Codes kKind, int T>
void float_rows(const Weight& w, const Tokens& a, const void* ready, int64_t begin, int64_t end, float* out,
                int64_t stride) {
  typedef Numbers<kKind> N;
  constexpr int kChains = N::kPacked ? 2 : 4;
  const float* x[T];
  for (int t = 0; t < T; ++t) x[t] = (const float*)a.block(ready, t);
  const int64_t groups = w.group ? w.groups : 1, size = w.group ? w.group : w.k;
  for_rows<T>(begin, end, out, stride, [&](int64_t n, vf* total) __attribute__((always_inline)) {
    const uint8_t* row = w.codes + n * w.code_row;
    for (int t = 0; t < T; ++t) total[t] = vf{};
    for (int64_t g = 0; g < groups; ++g) {
      int64_t k = g * size, last = k + size < w.k ? k + size : w.k, at = n * w.groups + g;
      float scale = 1, less = 0, more = 0;  // value = (code - less) * scale, or code * scale + more
      if constexpr (kKind == Codes::affine4) {
        scale = load_one((const f16*)w.scale + at) * w.row_scale[n], less = load_one((const f16*)w.zero + at);
      } else if constexpr (kKind == Codes::affine4m) {
        scale = load_one((const f16*)w.scale + at), more = load_one((const f16*)w.zero + at);
      } else if constexpr (kKind == Codes::int8g) {
        scale = load_one((const f16*)w.scale + at);
      } else if constexpr (kKind == Codes::book4) {
        scale = ((const float*)w.scale)[at];
      } else if constexpr (N::kScaled) {
        scale = ((const float*)w.scale)[n];
      }
      vf acc[T][kChains] = {};
      auto step = [&](const uint8_t* codes, int64_t k, int chain) __attribute__((always_inline)) {
        vf v[N::kVectors];
        N::read(codes, w.book, v);
        for (int i = 0; i < N::kVectors; ++i) {
          if constexpr (kKind == Codes::affine4) v[i] -= less;
          if constexpr (kKind == Codes::affine4m) v[i] = multiply_add(v[i], splat(scale), splat(more));
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) {
            vf& to = acc[t][N::kPacked ? i : chain];
            to = multiply_add(v[i], load(x[t] + k + i * W), to);
          }
        }
      };
      constexpr int64_t kAtOnce = N::kPacked ? N::kStep : kChains * N::kStep;
      for (; k + kAtOnce <= last; k += kAtOnce)
#pragma GCC unroll 4
        for (int c = 0; c < kAtOnce / N::kStep; ++c) step(row + N::bytes(k + c * N::kStep), k + c * N::kStep, c);
      for (; k + N::kStep <= last; k += N::kStep) step(row + N::bytes(k), k, 0);
      if (k < last) {  // the end of the row; tokens are zero beyond it
        uint8_t part[N::bytes(N::kStep)] = {};
        __builtin_memcpy(part, row + N::bytes(k), N::bytes(last - k));
        step(part, k, 0);
      }
      for (int t = 0; t < T; ++t) {
        vf sum = acc[t][0] + acc[t][1];
        if (kChains == 4) sum += acc[t][kChains - 2] + acc[t][kChains - 1];
        if constexpr (N::kScaled && kKind != Codes::affine4m) {
          total[t] = multiply_add(sum, splat(scale), total[t]);
        } else {
          total[t] += sum;
        }
      }
    }
  });
}

// ---- pairs of bfloat16 ----------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
// 32 codes of float8_e4m3fn as bfloat16, exactly.
BK_INLINE __m512i fp8_pairs(__m256i codes) {
  // Extended by its sign: bits 4 to 10 are the magnitude, and bit 15 the sign.
  __m512i wide = _mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 4);
  __m512i bits = _mm512_and_si512(wide, _mm512_set1_epi16((short)0x87f0));
  __m512i value = _mm512_add_epi16(bits, _mm512_set1_epi16(0x3c00));
  // Multiples of 2^-9 below 2^-6, and what is not a number.
  const __m512i small = _mm512_broadcast_i64x4(
      _mm256_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60, 0, 0, 0, 0, 0, 0, 0, 0));
  __mmask32 subnormal = _mm512_testn_epi16_mask(wide, _mm512_set1_epi16(0x0780));
  __m512i few = _mm512_permutexvar_epi16(_mm512_and_si512(_mm512_srli_epi16(wide, 4), _mm512_set1_epi16(7)), small);
  few = _mm512_or_si512(few, _mm512_and_si512(wide, _mm512_set1_epi16((short)0x8000)));
  value = _mm512_mask_mov_epi16(value, subnormal, few);
  __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(wide, _mm512_set1_epi16(0x07f0)), _mm512_set1_epi16(0x07f0));
  return _mm512_mask_mov_epi16(value, nan, _mm512_set1_epi16(0x7fc0));
}

BK_INLINE vf add_pairs(vf acc, __m512i w, const void* x) {
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)read<__m512i>(x));
}

template <bool kFp8, int T>
void pair_rows(const Weight& w, const Tokens& a, const void* ready, int64_t begin, int64_t end, float* out,
               int64_t stride) {
  const uint16_t* x[T];
  for (int t = 0; t < T; ++t) x[t] = (const uint16_t*)a.block(ready, t);
  for_rows<T>(begin, end, out, stride, [&](int64_t n, vf* total) __attribute__((always_inline)) {
    const uint8_t* row = w.codes + n * w.code_row;
    vf acc[T][4] = {};
    auto step = [&](__m512i v, int64_t k, int chain) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) acc[t][chain] = add_pairs(acc[t][chain], v, x[t] + k);
    };
    auto get = [&](int64_t k) __attribute__((always_inline)) {
      return kFp8 ? fp8_pairs(read<__m256i>(row + k)) : read<__m512i>(row + 2 * k);
    };
    int64_t k = 0;
    for (; k + 128 <= w.k; k += 128)
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) step(get(k + c * 32), k + c * 32, c);
    for (; k + 32 <= w.k; k += 32) step(get(k), k, 0);
    if (k < w.k) {
      __mmask32 some = ((__mmask32)1 << (w.k - k)) - 1;
      step(kFp8 ? fp8_pairs(_mm256_maskz_loadu_epi8(some, row + k)) : _mm512_maskz_loadu_epi16(some, row + 2 * k), k,
           0);
    }
    for (int t = 0; t < T; ++t) {
      total[t] = (acc[t][0] + acc[t][1]) + (acc[t][2] + acc[t][3]);
      if (kFp8) total[t] *= ((const float*)w.scale)[n];
    }
  });
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

template <Codes kKind, int kBlocks, int T>
void nibble_rows(const Weight& w, const Tokens& a, const void* ready, int64_t begin, int64_t end, float* out,
                 int64_t stride) {
  constexpr int kGroups = 4 / kBlocks;  // of a vector of codes
  const uint16_t* x[T];
  const float* sums[T];
  for (int t = 0; t < T; ++t) {
    const char* block = a.block(ready, t);
    x[t] = (const uint16_t*)block, sums[t] = a.sums_of(block);
  }
  const __m512i table = code_table(w);
  const vi lanes = lane_numbers(kBlocks == 4 ? 4 : kBlocks + 1, 0);
  for_rows<T>(begin, end, out, stride, [&](int64_t n, vf* total) __attribute__((always_inline)) {
    const uint8_t* row = w.codes + n * w.code_row;
    for (int t = 0; t < T; ++t) total[t] = vf{};
    auto vector = [&](__m512i codes, int64_t k, vf scale) __attribute__((always_inline)) {
      __m512i v[4];
      look_up_nibbles(codes, table, v);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        vf acc{};
        for (int j = 0; j < 4; ++j) acc = add_pairs(acc, v[j], x[t] + k + j * 32);
        total[t] = multiply_add(acc, scale, total[t]);
      }
    };
    auto scales = [&](int64_t g, int64_t count) __attribute__((always_inline)) {
      __mmask16 some = count >= kGroups ? (1 << kGroups) - 1 : (1 << count) - 1;
      vf few = kKind == Codes::book4
                   ? (vf)_mm512_maskz_loadu_ps(some, (const float*)w.scale + n * w.groups + g)
                   : (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, (const f16*)w.scale + n * w.groups + g));
      return pick_lanes(few, lanes);
    };
    int64_t k = 0, g = 0;
    for (; k + 128 <= w.k; k += 128, g += kGroups) vector(read<__m512i>(row + k / 2), k, scales(g, kGroups));
    if (k < w.k) {
      __mmask64 some = ~(__mmask64)0 >> (64 - (w.k - k + 1) / 2);
      vector(_mm512_maskz_loadu_epi8(some, row + k / 2), k, scales(g, w.groups - g));
    }
    if constexpr (kKind != Codes::book4)
      for (g = 0; g < w.groups; g += W) {
        vf beside = Coded<kKind>::beside(w, n * w.groups + g, w.groups - g);
        for (int t = 0; t < T; ++t) total[t] = multiply_add(beside, load(sums[t] + g), total[t]);
      }
    if constexpr (kKind == Codes::affine4)
      for (int t = 0; t < T; ++t) total[t] *= w.row_scale[n];
  });
}
#endif

// ---- transposed weights ---------------------------------------------------------------------------------------------

// Rows of the weight lie across: vectors are of their elements k, for one k after the other.
template <class N, int T>
void column_rows(const Weight& w, const Tokens& a, const void* ready, int64_t begin, int64_t end, float* out,
                 int64_t stride) {
  const float* x[T];
  for (int t = 0; t < T; ++t) x[t] = (const float*)a.block(ready, t);
  const int64_t line = w.code_row / (int64_t)sizeof(N);
  constexpr int V = W == 16 ? 4 : 2;
  for (int64_t n = begin; n < end;) {
    const N* from = (const N*)w.codes + n;
    auto columns = [&](auto vectors, int64_t count) __attribute__((always_inline)) {
      constexpr int kCount = decltype(vectors)::value;
      vf acc[T][kCount] = {};
      for (int64_t k = 0; k < w.k; ++k, from += line)
#pragma GCC unroll 4
        for (int v = 0; v < kCount; ++v) {
          vf value = count >= W * kCount ? load(from + v * W) : load(from + v * W, count);
          for (int t = 0; t < T; ++t) acc[t][v] = multiply_add(value, splat(x[t][k]), acc[t][v]);
        }
      for (int t = 0; t < T; ++t)
        for (int v = 0; v < kCount; ++v) {
          float* to = out + t * stride + n - begin + v * W;
          count >= W* kCount ? store(to, acc[t][v]) : store(to, acc[t][v], count);
        }
      n += count;
    };
    if (end - n >= V * W)
      columns(Count<V>(), V * W);
    else
      columns(Count<1>(), end - n < W ? end - n : W);
  }
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
