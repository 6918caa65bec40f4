// One to four tokens: along the rows of the weight, each read once, in its order. The sums over a vector's lanes are
// taken for 16 rows at once.
//
// A token's result does not depend on how many of the others there are, nor on where a call's rows begin.
#pragma once
#include "product_pairs.h"
#include "product_tokens.h"
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

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

// The sums over the lanes of 16 vectors.
BK_INLINE void sum_lanes(const vf* lanes, float* to) {
#if defined(__AVX512F__)
  alignas(64) float transposed[16][16];
  transpose16(lanes, 64, transposed, 64);
  vf all[16];
  for (int i = 0; i < 16; ++i) all[i] = load(transposed[i]);
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; ++i) all[i] += all[i + step];
  store(to, all[0]);
#else
  for (int i = 0; i < 16; ++i) to[i] = sum(lanes[i]);
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
      if (rows == 16) {
        sum_lanes(s.lanes[t], to);
      } else {
        alignas(64) float all[16];
        sum_lanes(s.lanes[t], all);
        __builtin_memcpy(to, all, rows * sizeof(float));
      }
    }
  }
};

// row(Count<R>(), n, lanes): the lanes of R rows from n on, or of one, for each token. Tokens are read once for R rows.
template <int R, int T, class Row>
BK_INLINE void for_rows(int64_t begin, int64_t end, float* out, int64_t stride, Row row) {
  Sums<T> sums(out, stride, begin);
  for (int64_t n = begin; n < end; n += 16) {
    const int64_t rows = end - n < 16 ? end - n : 16;
    int64_t i = 0;
    auto take = [&](auto count) __attribute__((always_inline)) {
      constexpr int kCount = decltype(count)::value;
      vf lanes[kCount][T];
      row(count, n + i, lanes);
      for (int r = 0; r < kCount; ++r)
        for (int t = 0; t < T; ++t) sums.lanes[t][i + r] = lanes[r][t];
      i += kCount;
    };
    while (rows - i >= R) take(Count<R>());
    if constexpr (R > 1)
      while (i < rows) take(Count<1>());
    for (; i < 16; ++i)
      for (int t = 0; t < T; ++t) sums.lanes[t][i] = vf{};
    Sums<T>::flush(sums, n, rows);
  }
}

// ---- integers -------------------------------------------------------------------------------------------------------

typedef uint8_t vq __attribute__((vector_size(W * 4)));
typedef uint16_t vw __attribute__((vector_size(W * 4)));

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define BK_HAS_DPBUSD 1
#endif

// acc + the sums of four products a lane; u < 128 where there is no vpdpbusd.
BK_INLINE vi dot(vi acc, vq u, vq s) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)u, (__m512i)s);
#elif defined(__AVXVNNI__)
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)u, (__m256i)s);
#elif defined(__AVX2__)
  return acc + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)u, (__m256i)s), _mm256_set1_epi16(1));
#elif defined(__x86_64__)
  return acc + (vi)_mm_madd_epi16(_mm_maddubs_epi16((__m128i)u, (__m128i)s), _mm_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (vi)vdotq_s32((int32x4_t)acc, (int8x16_t)u, (int8x16_t)s);
#else
  for (int i = 0; i < 4 * W; ++i) acc[i / 4] += (int)u[i] * (int8_t)s[i];
  return acc;
#endif
}

// The same for codes with a sign. The instruction takes one operand without: codes + kOffset, which the tokens' sums
// make up for; others take their magnitude, and give the sign to the tokens.
#if defined(BK_HAS_DPBUSD)
constexpr int kOffset = 128;
BK_INLINE vi dot_signed(vi acc, vq code, vq s) { return dot(acc, code ^ 0x80, s); }
#else
constexpr int kOffset = 0;
BK_INLINE vi dot_signed(vi acc, vq code, vq s) {
#if defined(__AVX2__)
  return dot(acc, (vq)_mm256_abs_epi8((__m256i)code), (vq)_mm256_sign_epi8((__m256i)s, (__m256i)code));
#elif defined(__x86_64__)
  return dot(acc, (vq)_mm_abs_epi8((__m128i)code), (vq)_mm_sign_epi8((__m128i)s, (__m128i)code));
#elif defined(__ARM_FEATURE_DOTPROD)
  return dot(acc, code, s);  // which takes signs of both
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
  for_rows<1, T>(begin, end, out, stride, [&](Count<1>, int64_t n, vf(*lane)[T]) __attribute__((always_inline)) {
    vf* total = lane[0];
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

// A code's value is (code - less) * scale, or code * scale + more.
template <Codes kKind>
struct GroupScale {
  float scale = 1, less = 0, more = 0;

  GroupScale(const Weight& w, int64_t n, int64_t g) {
    const int64_t at = n * w.groups + g;
    if constexpr (kKind == Codes::affine4) {
      scale = load_one((const f16*)w.scale + at) * w.row_scale[n], less = load_one((const f16*)w.zero + at);
    } else if constexpr (kKind == Codes::affine4m) {
      scale = load_one((const f16*)w.scale + at), more = load_one((const f16*)w.zero + at);
    } else if constexpr (kKind == Codes::int8g) {
      scale = load_one((const f16*)w.scale + at);
    } else if constexpr (kKind == Codes::book4) {
      scale = ((const float*)w.scale)[at];
    } else if constexpr (Numbers<kKind>::kScaled) {
      scale = ((const float*)w.scale)[n];
    }
  }
};

// R rows and T tokens, `step` apart. Sums of products of a group, by themselves where the group has a scale, are
// of one chain for each row and token, or of 2 (4 bits) or 4, so that one token's multiply-adds need not wait.
template <Codes kKind, int R, int T, int kChains>
BK_INLINE void float_tile(const Weight& w, const float* x, int64_t step, int64_t n, vf (*total)[R]) {
  typedef Numbers<kKind> N;
  constexpr bool kAfter = N::kScaled && kKind != Codes::affine4m;  // the scale multiplies sums
  const uint8_t* rows = w.codes + n * w.code_row;
  const int64_t groups = w.group ? w.groups : 1, size = w.group ? w.group : w.k;
  for (int t = 0; t < T; ++t)
    for (int r = 0; r < R; ++r) total[t][r] = vf{};
  for (int64_t g = 0; g < groups; ++g) {
    int64_t k = g * size;
    const int64_t last = k + size < w.k ? k + size : w.k;
    float scale[R], less[R], more[R];
    for (int r = 0; r < R; ++r) {
      GroupScale<kKind> of(w, n + r, g);
      scale[r] = of.scale, less[r] = of.less, more[r] = of.more;
    }
    vf acc[T][R][kChains] = {};
    auto add = [&](int r, const uint8_t* codes, int64_t k, int chain) __attribute__((always_inline)) {
      vf v[N::kVectors];
      N::read(codes, w.book, v);
      for (int i = 0; i < N::kVectors; ++i) {
        if constexpr (kKind == Codes::affine4) v[i] -= less[r];
        if constexpr (kKind == Codes::affine4m) v[i] = multiply_add(v[i], splat(scale[r]), splat(more[r]));
      }
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
        for (int i = 0; i < N::kVectors; ++i) {
          vf& to = acc[t][r][kChains == 1 ? 0 : N::kPacked ? i : chain];
          to = multiply_add(v[i], load(x + t * step + k + i * W), to);
        }
    };
    constexpr int kSteps = kChains == 4 ? 4 : 1;
    for (; k + kSteps * N::kStep <= last; k += kSteps * N::kStep) {
      if constexpr (R * T == 1) __builtin_prefetch(rows + N::bytes(k) + 2048, 0, 2);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < kSteps; ++c)
          add(r, rows + r * w.code_row + N::bytes(k + c * N::kStep), k + c * N::kStep, c);
    }
    if constexpr (kSteps > 1)
      for (; k + N::kStep <= last; k += N::kStep) add(0, rows + N::bytes(k), k, 0);
    if (k < last) {  // the end of the row; tokens are zero beyond it
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        uint8_t part[N::bytes(N::kStep)] = {};
        __builtin_memcpy(part, rows + r * w.code_row + N::bytes(k), N::bytes(last - k));
        add(r, part, k, 0);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        vf sum = acc[t][r][0];
        if (kChains == 2) sum += acc[t][r][kChains - 1];
        if (kChains == 4) sum = (sum + acc[t][r][1 % kChains]) + (acc[t][r][2 % kChains] + acc[t][r][3 % kChains]);
        if constexpr (kAfter) {
          total[t][r] = multiply_add(sum, splat(scale[r]), total[t][r]);
        } else {
          total[t][r] += sum;
        }
      }
  }
}

// One token, a row after the other, which is how the memory is fastest.
template <Codes kKind>
void float_rows(const Weight& w, const Tokens& a, const void* ready, int64_t begin, int64_t end, float* out,
                int64_t stride) {
  const float* x = (const float*)a.block(ready, 0);
  for_rows<1, 1>(begin, end, out, stride, [&](Count<1>, int64_t n, vf(*lanes)[1]) __attribute__((always_inline)) {
    float_tile<kKind, 1, 1, is_packed(kKind) ? 2 : 4>(w, x, 0, n, lanes);
  });
}

// More of them: tiles of rows and tokens; rows stay in the cache meanwhile.
template <Codes kKind>
void float_tiles(const Weight& w, const Tokens& a, const void* ready, int64_t begin, int64_t end, float* out,
                 int64_t stride) {
  constexpr int R = 4;
  for (int64_t n = begin; n < end;) {
    auto tile = [&](auto rows, auto tokens, int64_t m) __attribute__((always_inline)) {
      constexpr int kRows = decltype(rows)::value, T = decltype(tokens)::value;
      vf lanes[T][kRows];
      float_tile<kKind, kRows, T, 1>(w, (const float*)a.block(ready, m), a.bytes / 4, n, lanes);
      float* to = out + m * stride + n - begin;
      if constexpr (kRows * T == 16) {
        alignas(64) float sums[T][kRows];
        sum_lanes(lanes[0], sums[0]);
        for (int t = 0; t < T; ++t) __builtin_memcpy(to + t * stride, sums[t], sizeof sums[t]);
      } else {
        for (int t = 0; t < T; ++t)
          for (int r = 0; r < kRows; ++r) to[t * stride + r] = sum(lanes[t][r]);
      }
    };
    auto all = [&](auto rows) __attribute__((always_inline)) {
      int64_t m = 0;
      for (; a.m - m >= 4; m += 4) tile(rows, Count<4>(), m);
      if (a.m - m >= 2) tile(rows, Count<2>(), m), m += 2;
      if (a.m - m >= 1) tile(rows, Count<1>(), m);
      n += decltype(rows)::value;
    };
    end - n >= R ? all(Count<R>()) : all(Count<1>());
  }
}

// ---- pairs of bfloat16 ----------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
BK_INLINE vf add_pair(vf acc, __m512i w, const void* x) {
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)read<__m512i>(x));
}

// kBlocks: of 32, in a group of the weight; 0: a row has one scale, or none.
template <Codes kKind, int kBlocks, int T>
void pair_rows(const Weight& w, const Tokens& a, const void* ready, int64_t begin, int64_t end, float* out,
               int64_t stride) {
  constexpr bool kPlain = kKind == Codes::bf16;
  constexpr int kChains = T > 1 ? 2 : 4;
  const uint16_t* x[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) x[t] = (const uint16_t*)a.block(ready, t);
  for_rows<(T > 1 ? 2 : 1), T>(
      begin, end, out, stride, [&](auto rows, int64_t n, auto* total) __attribute__((always_inline)) {
        constexpr int R = decltype(rows)::value;
        const uint8_t* row = w.codes + n * w.code_row;
        vf acc[R][T][kChains] = {};
        auto step = [&](auto get, int64_t k, int chain) __attribute__((always_inline)) {
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) {
            const __m512i v = get(row + r * w.code_row, k);
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) acc[r][t][chain] = add_pair(acc[r][t][chain], v, x[t] + k);
          }
        };
        auto whole = [&](const uint8_t* row, int64_t k) __attribute__((always_inline)) {
          if constexpr (kPlain) return read<__m512i>(row + 2 * k);
          return eight_bit_pairs<kKind>(read<__m256i>(row + k));
        };
        auto rest = [&](const uint8_t* row, int64_t k) __attribute__((always_inline)) {
          const __mmask32 some = w.k - k >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << (w.k - k)) - 1;
          if constexpr (kPlain) return _mm512_maskz_loadu_epi16(some, row + 2 * k);
          return eight_bit_pairs<kKind>(_mm256_maskz_loadu_epi8(some, row + k));
        };
        auto sum_of = [&](int r, int t) __attribute__((always_inline)) {
          vf sum = acc[r][t][0] + acc[r][t][1];
          if (kChains == 4) sum += acc[r][t][kChains - 2] + acc[r][t][kChains - 1];
          return sum;
        };
        if constexpr (kBlocks > 0) {
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) total[r][t] = vf{};
          for (int64_t g = 0; g < w.groups; ++g) {
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
              for (int t = 0; t < T; ++t)
                for (int c = 0; c < kChains; ++c) acc[r][t][c] = vf{};
            const int64_t k = g * kBlocks * 32;
            if (k + kBlocks * 32 <= w.k)
#pragma GCC unroll 4
              for (int c = 0; c < kBlocks; ++c) step(whole, k + c * 32, c % kChains);
            else
              for (int64_t at = k; at < w.k; at += 32) step(rest, at, 0);
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r) {
              const vf own = splat(load_one((const f16*)w.scale + (n + r) * w.groups + g));
#pragma GCC unroll 4
              for (int t = 0; t < T; ++t) total[r][t] = multiply_add(sum_of(r, t), own, total[r][t]);
            }
          }
        } else {
          int64_t k = 0;
          for (; k + 128 <= w.k; k += 128)
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) step(whole, k + c * 32, c % kChains);
          for (; k + 32 <= w.k; k += 32) step(whole, k, 0);
          if (k < w.k) step(rest, k, 0);
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t)
              total[r][t] = kPlain ? sum_of(r, t) : sum_of(r, t) * splat(((const float*)w.scale)[n + r]);
        }
      });
}

template <Codes kKind, int kBlocks, int T>
void nibble_rows(const Weight& w, const Tokens& a, const void* ready, int64_t begin, int64_t end, float* out,
                 int64_t stride) {
  constexpr int kGroups = 4 / kBlocks;  // of a vector of codes
  const uint16_t* x[T];
  const float* sums[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    const char* block = a.block(ready, t);
    x[t] = (const uint16_t*)block, sums[t] = a.sums_of(block);
  }
  const __m512i table = code_table(w);
  const vi lanes = lane_numbers(kBlocks == 4 ? 4 : kBlocks + 1, 0);
  for_rows<(T > 1 ? 2 : 1), T>(
      begin, end, out, stride, [&](auto rows, int64_t n, auto* total) __attribute__((always_inline)) {
        constexpr int R = decltype(rows)::value;
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) total[r][t] = vf{};
        auto vector = [&](int r, __m512i codes, int64_t k, vf scale) __attribute__((always_inline)) {
          __m512i v[4];
          look_up_nibbles(codes, table, v);
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) {
            vf acc{};
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) acc = add_pair(acc, v[j], x[t] + k + j * 32);
            total[r][t] = multiply_add(acc, scale, total[r][t]);
          }
        };
        auto scales = [&](int64_t row, int64_t g, int64_t count) __attribute__((always_inline)) {
          __mmask16 some = count >= kGroups ? (1 << kGroups) - 1 : (1 << count) - 1;
          vf few = kKind == Codes::book4
                       ? (vf)_mm512_maskz_loadu_ps(some, (const float*)w.scale + row * w.groups + g)
                       : (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, (const f16*)w.scale + row * w.groups + g));
          return pick_lanes(few, lanes);
        };
        int64_t k = 0, g = 0;
        for (; k + 128 <= w.k; k += 128, g += kGroups)
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r)
            vector(r, read<__m512i>(w.codes + (n + r) * w.code_row + k / 2), k, scales(n + r, g, kGroups));
        if (k < w.k) {
          __mmask64 some = ~(__mmask64)0 >> (64 - (w.k - k + 1) / 2);
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r)
            vector(r, _mm512_maskz_loadu_epi8(some, w.codes + (n + r) * w.code_row + k / 2), k,
                   scales(n + r, g, w.groups - g));
        }
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
          if constexpr (kKind != Codes::book4)
            for (g = 0; g < w.groups; g += W) {
              vf beside = Coded<kKind>::beside(w, (n + r) * w.groups + g, w.groups - g);
#pragma GCC unroll 4
              for (int t = 0; t < T; ++t) total[r][t] = multiply_add(beside, load(sums[t] + g), total[r][t]);
            }
          if constexpr (kKind == Codes::affine4)
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) total[r][t] *= w.row_scale[n + r];
        }
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
