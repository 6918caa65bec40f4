// Decode attention's products in vector registers: any storage type, any level.
#pragma once
#include "decode_blocks.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

template <int N>
struct Number {
  static constexpr int value = N;
};

// One vector of floats.
template <class C>
struct Elements {
  typedef float Left;  // what they are multiplied with
  typedef vf Vector;
  static constexpr int kVectors = 1, kStep = W;  // vectors of sums, and elements, a step of a product
  static constexpr int kKeysAtOnce = 1;          // of a product over keys

  BK_INLINE vf load(const char* p) { return BK_ISA::load((const C*)p); }
  // The first n elements, n < W; zero beyond. Does not touch the others, which may lie on a page that is not there.
  BK_INLINE vf load(const char* p, int64_t n) {
#if defined(__AVX512F__)
    __mmask16 mask = (__mmask16)((1u << n) - 1);
    if constexpr (sizeof(C) == 4)
      return (vf)_mm512_maskz_loadu_ps(mask, p);
    else if constexpr (sizeof(C) == 2)
      return widen((vh)_mm256_maskz_loadu_epi16(mask, p), (const C*)p);
    else
      return widen((vb)_mm_maskz_loadu_epi8(mask, p), (const C*)p);
#else
    return BK_ISA::load((const C*)p, n);
#endif
  }
  BK_INLINE vf multiply_add(vf acc, vf a, vf b) { return acc + a * b; }

  // The values of one key, and one weight in all lanes.
  template <class Get>
  BK_INLINE void values(const char* const* v, int64_t at, vf* to, Get get) {
    *to = get(*v + at);
  }
  BK_INLINE vf weight(const float* p) { return splat(*p); }
  BK_INLINE void in_order(vf*) {}
};

#if defined(__AVX512BF16__)
// One vector of pairs: of neighbours in a product over elements, of two keys in a product over keys.
template <>
struct Elements<bf16> {
  typedef bf16 Left;
  typedef __m512i Vector;
  static constexpr int kVectors = 2, kStep = 32, kKeysAtOnce = 2;

  BK_INLINE __m512i load(const char* p) { return read<__m512i>(p); }
  BK_INLINE __m512i load(const char* p, int64_t n) {
    return _mm512_maskz_loadu_epi16((__mmask32)((uint64_t{1} << n) - 1), p);
  }
  BK_INLINE vf multiply_add(vf acc, __m512i a, __m512i b) {
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
  template <class Get>
  BK_INLINE void values(const char* const* v, int64_t at, __m512i* to, Get get) {
    __m512i a = get(v[0] + at), b = get(v[1] + at);
    to[0] = _mm512_unpacklo_epi16(a, b);
    to[1] = _mm512_unpackhi_epi16(a, b);
  }
  BK_INLINE __m512i weight(const bf16* p) { return _mm512_set1_epi32(read<int32_t>(p)); }
  // Two vectors of sums as `values` interleaves them, in the order of their elements.
  BK_INLINE void in_order(vf* x) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    __m512 a = (__m512)x[0], b = (__m512)x[1];
    x[0] = (vf)_mm512_permutex2var_ps(a, low, b);
    x[1] = (vf)_mm512_permutex2var_ps(a, high, b);
  }
};
#endif

template <class C>
using Left = typename Elements<C>::Left;

// Lane i of the result is the sum of x[i].
BK_INLINE vf sums(vf* x) {
#if defined(__x86_64__)
#if defined(__AVX512F__)
#define BK_SHUFFLE(a, b, by) ((vf)_mm512_shuffle_ps((__m512)(a), (__m512)(b), by))
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (!(i & 4)) {
      __m512 a = (__m512)x[i], b = (__m512)x[i + 4];
      x[i] = (vf)_mm512_shuffle_f32x4(a, b, 0x44) + (vf)_mm512_shuffle_f32x4(a, b, 0xee);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512 a = (__m512)x[i], b = (__m512)x[i + 8];
    x[i] = (vf)_mm512_shuffle_f32x4(a, b, 0x88) + (vf)_mm512_shuffle_f32x4(a, b, 0xdd);
  }
#elif defined(__AVX2__)
#define BK_SHUFFLE(a, b, by) ((vf)_mm256_shuffle_ps((__m256)(a), (__m256)(b), by))
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m256 a = (__m256)x[i], b = (__m256)x[i + 4];
    x[i] = (vf)_mm256_permute2f128_ps(a, b, 0x20) + (vf)_mm256_permute2f128_ps(a, b, 0x31);
  }
#else
#define BK_SHUFFLE(a, b, by) ((vf)_mm_shuffle_ps((__m128)(a), (__m128)(b), by))
#endif
  vf low = BK_SHUFFLE(x[0], x[1], 0x44) + BK_SHUFFLE(x[0], x[1], 0xee);
  vf high = BK_SHUFFLE(x[2], x[3], 0x44) + BK_SHUFFLE(x[2], x[3], 0xee);
  return BK_SHUFFLE(low, high, 0x88) + BK_SHUFFLE(low, high, 0xdd);
#undef BK_SHUFFLE
#else
  vf s;
  for (int i = 0; i < W; ++i) s[i] = sum(x[i]);
  return s;
#endif
}

// R rows of q times W / R keys, `at` bytes after their pointers.
template <class C, int R>
BK_INLINE void score_tile(const typename Elements<C>::Left* q, int64_t q_row, const char* const* k, int64_t at,
                          int64_t d, float* s) {
  typedef Elements<C> E;
  constexpr int K = W / R;
  vf acc[W] = {};
  auto step = [&](int64_t e, auto get) __attribute__((always_inline)) {
    typename E::Vector key[K];
#pragma GCC unroll 16
    for (int j = 0; j < K; ++j) key[j] = get(k[j] + at + e * sizeof(C));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      auto left = read<typename E::Vector>(q + r * q_row + e);
#pragma GCC unroll 16
      for (int j = 0; j < K; ++j) acc[r * K + j] = E::multiply_add(acc[r * K + j], left, key[j]);
    }
  };
  int64_t e = 0, n = d % E::kStep;
  for (; e + E::kStep <= d; e += E::kStep)
    step(e, [](const char* p) __attribute__((always_inline)) { return E::load(p); });
  if (n) step(e, [n](const char* p) __attribute__((always_inline)) { return E::load(p, n); });
  vf total = sums(acc);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) __builtin_memcpy(s + r * kKeys, (const float*)&total + r * K, K * sizeof(float));
}

// Calls f(Number<R>(), row) for tiles of R rows: W / 4 of them, and fewer at the end.
template <class F>
BK_INLINE void for_rows(int64_t rows, F f) {
  int64_t r = 0;
  for (; rows - r >= W / 4; r += W / 4) f(Number<W / 4>(), r);
  if constexpr (W == 16)
    if (rows - r >= 2) f(Number<2>(), r), r += 2;
  if constexpr (W >= 8)
    if (rows - r == 1) f(Number<1>(), r);
}
// The same where a tile may have any number of rows up to W / 4.
template <class F>
BK_INLINE void for_any_rows(int64_t rows, F f) {
  if constexpr (W == 16) {
    int64_t r = 0;
    for (; rows - r >= 4; r += 4) f(Number<4>(), r);
    if (rows - r == 3) return f(Number<3>(), r);
    if (rows - r == 2) return f(Number<2>(), r);
    if (rows - r == 1) return f(Number<1>(), r);
  } else {
    for_rows(rows, f);
  }
}

// R rows of weights times U steps of the values' elements; Last: less than a step, n elements.
template <class C, int R, int U, bool Last>
BK_INLINE void weigh_tile(const Layout& n, const typename Elements<C>::Left* p, const Block& b, int64_t at,
                          int64_t elements, float* acc, const float* factor, Ahead* ahead) {
  typedef Elements<C> E;
  constexpr int V = U * E::kVectors, row = kKeys * sizeof(float) / sizeof(typename E::Left);
  vf total[R][V] = {};
  for (int64_t t = 0; t < b.count; t += E::kKeysAtOnce) {
    if (ahead) Ahead::step(*ahead);
    typename E::Vector v[V];
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u)
      E::values(b.v + t, at + u * E::kStep * sizeof(C), v + u * E::kVectors,
                [elements](const char* from)
                    __attribute__((always_inline)) { return Last ? E::load(from, elements) : E::load(from); });
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      auto w = E::weight(p + r * row + t);
#pragma GCC unroll 8
      for (int i = 0; i < V; ++i) total[r][i] = E::multiply_add(total[r][i], w, v[i]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) {
      float* to = acc + r * n.acc_width + i * W;
      store(to, load(to) * factor[r] + total[r][i]);
    }
}

template <class C, int R, int U>
BK_INLINE void weigh_columns(const Layout& n, const typename Elements<C>::Left* p, const Block& b, int64_t at,
                             int64_t from, int64_t dv, float* acc, const float* factor, Ahead* ahead) {
  constexpr int64_t step = Elements<C>::kStep;
  for (; from + U * step <= dv; from += U * step, ahead = nullptr)
    weigh_tile<C, R, U, false>(n, p, b, at + from * sizeof(C), 0, acc + from, factor, ahead);
  if constexpr (U > 1) {
    weigh_columns<C, R, U / 2>(n, p, b, at, from, dv, acc, factor, ahead);
  } else if (from < dv) {
    weigh_tile<C, R, 1, true>(n, p, b, at + from * sizeof(C), dv - from, acc + from, factor, ahead);
  }
}

template <class C>
struct Vectors {
  typedef C Cache;
  typedef Elements<C> E;
  typedef typename E::Left Left;
  static constexpr int kVectors = E::kVectors;  // that `row` gives at once
  static constexpr int kRows = 1;               // of sums for one of weights
  static constexpr bool kLines = true;          // whether its blocks may be those of decode_line.h

  static Layout layout(const DecodeAttention& a, int64_t queries) {
    Layout n(a, queries, E::kStep);
    n.acc_rows = n.total_rows = n.rows, n.acc_width = padded(n.dv, kVectors * W);
    n.q_row = n.d * sizeof(Left), n.q_head = padded(n.rows * n.q_row, kLine);
    n.weights = n.staging = 0;  // weights take the place of the scores
    return n;
  }
  BK_INLINE void begin(const Layout&) {}
  BK_INLINE void end() {}

  // Elements [e, e + W) of row r.
  BK_INLINE void put_query(const Layout& n, char* q, int64_t r, int64_t e, vf x) {
    store((Left*)(q + r * n.q_row) + e, x);
  }
  // s (rows, kKeys): the products of the rows of q and the keys of a block.
  static void scores(const Layout& n, const char* q, const Block& b, int64_t at, int64_t d, float* s, char*,
                     Ahead& ahead) {
    for_rows(n.rows, [&](auto count, int64_t r) __attribute__((always_inline)) {
      constexpr int R = decltype(count)::value, K = W / R;
      if (r == 0) Ahead::begin(ahead, (b.count + K - 1) / K);
      for (int64_t t = 0; t < b.count; t += K) {
        if (r == 0) Ahead::step(ahead);
        const char* k[K];
        for (int j = 0; j < K; ++j) k[j] = b.k[t + j < b.count ? t + j : b.count];
        score_tile<C, R>((const Left*)(q + r * n.q_row), n.d, k, at, d, s + r * kKeys + t);
      }
    });
  }
  // The weights of W keys from i on, in place of the scores: they are no longer.
  BK_INLINE void put_weights(const Layout&, float* s, float*, int64_t r, int64_t i, vf p) {
    store((Left*)(s + r * kKeys) + i, p);
  }
  static void weigh(const Layout& n, const float* s, const float*, const Block& b, int64_t at, int64_t dv, float* acc,
                    const float* factor, char*, Ahead& ahead) {
    Ahead::begin(ahead, (b.count + E::kKeysAtOnce - 1) / E::kKeysAtOnce);
    for_any_rows(n.rows, [&](auto count, int64_t r) __attribute__((always_inline)) {
      constexpr int R = decltype(count)::value;
      constexpr int V = W == 16 ? (R >= 3 ? 4 : 8) : W == 8 ? (R == 2 ? 4 : 8) : 8;  // vectors of sums a row
      weigh_columns<C, R, V / kVectors>(n, (const Left*)(s + r * kKeys), b, at, 0, dv, acc + r * n.acc_width,
                                        factor + r, r == 0 ? &ahead : nullptr);
    });
  }
  // Sums of row r from element e on, in order.
  BK_INLINE void row(const Layout& n, const float* acc, int64_t r, int64_t e, vf* x) {
    for (int i = 0; i < kVectors; ++i) x[i] = load(acc + r * n.acc_width + e + i * W);
    E::in_order(x);
  }
};

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
