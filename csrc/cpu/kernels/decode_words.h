// The same for an int8 cache by integer products: codes become words of 16 bits, with a shared load and no conversion
// to floats; queries are rounded to words of their largest value, and weights to those of the largest of 16 keys. That
// is 2^-16 of them: far below what the codes have lost, but more than float32 would.
#pragma once
#include "decode_line.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

#if defined(__AVX512VNNI__)
constexpr int kWords = 32;     // of a vector
constexpr int kMostSteps = 8;  // 256 elements of a head: sums of products stay within 32 bits
constexpr float kWord = 32767.0f;

// Whether a head's elements fill vectors.
BK_INLINE bool by_words(int64_t d, int64_t dv) {
  return (d == kWords || d == 2 * kWords || d == 4 * kWords || d == kMostSteps * kWords) && dv % kWords == 0;
}

BK_INLINE __m512i words(const char* codes) { return _mm512_cvtepi8_epi16(read<__m256i>(codes)); }

// What values in [-most, most] are multiplied with to become words, and what words are worth. Where the largest is not
// finite, neither is the latter; where all are next to nothing, both are 0.
struct WordScale {
  float to, from;

  // most: the magnitudes' bits, which are in their order, and those of NaN above all.
  explicit WordScale(vi most) {
    int32_t top = _mm512_reduce_max_epi32((__m512i)most);
    float largest;
    __builtin_memcpy(&largest, &top, sizeof largest);
    to = kWord / largest, from = largest * (1 / kWord);
    if (largest < 0x1p-110f) to = from = 0;
    if (!(largest <= kLargestFloat)) to = 0, from = __builtin_nanf("");
  }

 private:
  static constexpr float kLargestFloat = 0x1.fffffep127f;
};
BK_INLINE vi magnitude(vf x) { return (vi)x & 0x7fffffff; }
BK_INLINE __m256i to_words(vf x, float by) { return _mm512_cvtepi32_epi16(_mm512_cvtps_epi32((__m512)(x * by))); }

// R rows of queries as words, and what a product of theirs is worth.
template <int R, int kSteps>
BK_INLINE void query_words(const Layout& n, const float* q, float scale, int16_t (*to)[kSteps * kWords], float* by) {
  for (int r = 0; r < R; ++r) {
    vi most{};
    for (int e = 0; e < kSteps * kWords; e += W) {
      vi bits = magnitude(load(q + r * n.d + e));
      most = bits > most ? bits : most;
    }
    const WordScale s(most);
    for (int e = 0; e < kSteps * kWords; e += W) write(to[r] + e, to_words(load(q + r * n.d + e), s.to));
    by[r] = s.from * scale;
  }
}

BK_INLINE __m512i add_halves(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
}
BK_INLINE __m512i add_quarters(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}
// The last steps of `sums`, of integers: lane i + 4 j of the result is of x[i], as its quarter j has it.
BK_INLINE vf add_lanes(const __m512i* x) {
#define BK_SHUFFLE(a, b, by) _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), by))
  __m512i low = _mm512_add_epi32(BK_SHUFFLE(x[0], x[1], 0x44), BK_SHUFFLE(x[0], x[1], 0xee));
  __m512i high = _mm512_add_epi32(BK_SHUFFLE(x[2], x[3], 0x44), BK_SHUFFLE(x[2], x[3], 0xee));
  return (vf)_mm512_cvtepi32_ps(_mm512_add_epi32(BK_SHUFFLE(low, high, 0x88), BK_SHUFFLE(low, high, 0xdd)));
#undef BK_SHUFFLE
}

// The products of R rows and 16 keys. Of four keys at once, loads and conversions are those of all rows.
template <int R, int kSteps>
BK_INLINE void word_products(const int16_t (*q)[kSteps * kWords], const Line& keys, bool ahead, vf* to) {
  __m512i part[R][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const char* k[4];
    for (int i = 0; i < 4; ++i) k[i] = keys.first + (j + 4 * i) * keys.by;
    if (ahead)
      for (int i = 0; i < 4; ++i)
        for (int e = 0; e < kSteps * kWords; e += kLine) ask(keys.ahead + (j + 4 * i) * keys.ahead_by + e);
    __m512i acc[R][4];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 4; ++i) acc[r][i] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int s = 0; s < kSteps; ++s) {
      __m512i key[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) key[i] = words(k[i] + s * kWords);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512i row = read<__m512i>(q[r] + s * kWords);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[r][i] = _mm512_dpwssd_epi32(acc[r][i], row, key[i]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      part[r][j] = add_quarters(add_halves(acc[r][0], acc[r][1]), add_halves(acc[r][2], acc[r][3]));
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) to[r] = add_lanes(part[r]);
}

// R rows of weights, two keys a lane, times 32 elements of 16 values, U times.
template <int R, int U>
BK_INLINE void word_sums(const Layout& n, const int16_t (*w)[kLineKeys], const float* by, const Line& values,
                         int64_t from, float* acc, const float* factor, bool ahead) {
  __m512i total[R][2 * U];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < 2 * U; ++i) total[r][i] = _mm512_setzero_si512();
  const char *v = values.first + from, *next = values.ahead + from;
#pragma GCC unroll 2
  for (int64_t t = 0; t < kLineKeys; t += 2, v += 2 * values.by, next += 2 * values.ahead_by) {
    if (ahead) ask(next), ask(next + values.ahead_by);
    __m512i x[2 * U];
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u) {
      __m512i a = words(v + u * kWords), b = words(v + values.by + u * kWords);
      x[2 * u] = _mm512_unpacklo_epi16(a, b), x[2 * u + 1] = _mm512_unpackhi_epi16(a, b);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512i pair = _mm512_set1_epi32(read<int32_t>(w[r] + t));
#pragma GCC unroll 4
      for (int i = 0; i < 2 * U; ++i) total[r][i] = _mm512_dpwssd_epi32(total[r][i], x[i], pair);
    }
  }
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u) {
      const __m512i a = total[r][2 * u], b = total[r][2 * u + 1];
      float* to = acc + r * n.acc_width + u * kWords;
      vf first = (vf)_mm512_cvtepi32_ps(_mm512_permutex2var_epi32(a, low, b)) * by[r];
      vf second = (vf)_mm512_cvtepi32_ps(_mm512_permutex2var_epi32(a, high, b)) * by[r];
      store(to, load(to) * factor[r] + first);
      store(to + W, load(to + W) * factor[r] + second);
    }
}

template <int R, int kSteps>
void word_rows(const Layout& n, const float* q, const State& state, int64_t row, Line keys, Line values, int64_t dv,
               float scale, bool ahead) {
  alignas(64) int16_t queries[R][kSteps * kWords], w[R][kLineKeys];
  float by[R], back[R], factor[R];
  query_words<R, kSteps>(n, q, scale, queries, by);
  for (int64_t key = 0; key < kKeys; key += kLineKeys, keys.move(kLineKeys), values.move(kLineKeys)) {
    vf x[R];
    word_products<R, kSteps>(queries, keys, ahead, x);
    const vf k_scale = load(keys.scale), v_scale = load(values.scale);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      vf p = x[r] * (k_scale * by[r]);
      line_weights<1>(state, row + r, &p, factor + r);
      p *= v_scale;
      const WordScale s(magnitude(p));
      write(w[r], to_words(p, s.to));
      back[r] = s.from;
    }
    float* acc = state.acc + row * n.acc_width;
    int64_t e = 0;
    for (; e + 2 * kWords <= dv; e += 2 * kWords) word_sums<R, 2>(n, w, back, values, e, acc + e, factor, ahead);
    if (e < dv) word_sums<R, 1>(n, w, back, values, e, acc + e, factor, ahead);
  }
}

// All rows of a head, as line_block.
BK_INLINE void word_block(const Layout& n, const char* q, const State& state, const Line& keys, const Line& values,
                          int64_t d, int64_t dv, float scale) {
  for_any_rows(n.rows, [&](auto count, int64_t r) __attribute__((always_inline)) {
    constexpr int R = decltype(count)::value;
    const float* rows = (const float*)(q + r * n.q_row);
    switch (d / kWords) {
      case 1: return word_rows<R, 1>(n, rows, state, r, keys, values, dv, scale, r == 0);
      case 2: return word_rows<R, 2>(n, rows, state, r, keys, values, dv, scale, r == 0);
      case 4: return word_rows<R, 4>(n, rows, state, r, keys, values, dv, scale, r == 0);
      default: return word_rows<R, kMostSteps>(n, rows, state, r, keys, values, dv, scale, r == 0);
    }
  });
}
#else
BK_INLINE bool by_words(int64_t, int64_t) { return false; }
BK_INLINE void word_block(const Layout&, const char*, const State&, const Line&, const Line&, int64_t, int64_t, float) {
}
#endif

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
