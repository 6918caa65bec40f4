// Lines of an int8 cache by products of bytes: codes are multiplied as they are. Queries are rounded to 16 bits of
// their largest value and weights to 16 bits of the largest of 64 keys, two bytes each. That is 2^-16 of them: far
// below what the codes have lost, but more than float32 would.
#pragma once
#include "decode_line.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

#if BK_QUARTERS
constexpr int64_t kBytes = 64;     // of a vector
constexpr int64_t kMostSteps = 4;  // 256 elements of a head: sums of products stay within 32 bits

// Whether a head's elements fill vectors.
BK_INLINE bool by_bytes(int64_t d, int64_t dv) {
  return (d == kBytes || d == 2 * kBytes || d == kMostSteps * kBytes) && dv % kBytes == 0;
}

// What values in [-most, most] are multiplied with to become whole numbers up to `whole`, and what these are worth.
// Where the largest is not finite, neither is the latter; where all are next to nothing, both are 0.
struct WholeScale {
  float to, from;

  // most: the magnitudes' bits, which are in their order, and those of NaN above all.
  WholeScale(vi most, float whole) {
    int32_t top = _mm512_reduce_max_epi32((__m512i)most);
    float largest;
    __builtin_memcpy(&largest, &top, sizeof largest);
    to = whole / largest, from = largest / whole;
    if (largest < 0x1p-110f) to = from = 0;
    if (!(largest <= kLargestFloat)) to = 0, from = __builtin_nanf("");
  }

 private:
  static constexpr float kLargestFloat = 0x1.fffffep127f;
};
BK_INLINE vi larger_magnitude(vf x, vi most) {
  const vi bits = (vi)vabs(x);
  return bits > most ? bits : most;
}
BK_INLINE __m512i whole(vf x) { return _mm512_cvtps_epi32((__m512)x); }

// Heads of 64 kSteps elements. A product of bytes takes unsigned ones on one side: keys count from -128 on, of which
// the sums begin with their part less.
template <int R, int kSteps>
struct ByteRows {
  __m512i q[2][R][kSteps][4];  // upper bytes, and what is left, both signed
  __m512i start[R];
  float by[R];  // what a product is worth

  ByteRows(const float* rows, int64_t distance, float scale) {
    for (int r = 0; r < R; ++r) {
      const float* row = rows + r * distance;
      vi most{};
      for (int e = 0; e < kSteps * kBytes; e += W) most = larger_magnitude(load(row + e), most);
      const WholeScale s(most, 127 * 256 + 127);
      by[r] = s.from * scale;
      alignas(64) int8_t bytes[2][kSteps * kBytes];
      alignas(64) int32_t first[W] = {};
      for (int e = 0; e < kSteps * kBytes; e += W) {
        const __m512i x = whole(load(row + e) * s.to);
        const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
        write(bytes[0] + e, _mm512_cvtepi32_epi8(upper));
        write(bytes[1] + e, _mm512_cvtepi32_epi8(x));
        const int32_t less = -128 * _mm512_reduce_add_epi32(x);
        for (int j = 0; j < 4; ++j) first[e / W % 4 * 4 + j] += less;
      }
      start[r] = read<__m512i>(first);
      for (int plane = 0; plane < 2; ++plane)
        for (int s = 0; s < kSteps; ++s) spread(read<__m512i>(bytes[plane] + s * kBytes), q[plane][r][s]);
    }
  }

  // to[r]: of keys [from, from + 16).
  BK_INLINE void products(const ByteRows& rows, const Line& keys, int64_t from, bool ahead, vf* to) {
    __m512i sum[R][4];
    const char* k = keys.first + from * keys.by;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {  // fours of keys at once: a row of q is read for two of them
      __m512i acc[2][R][2];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        for (int g = 0; g < 2; ++g) acc[0][r][g] = _mm512_setzero_si512(), acc[1][r][g] = rows.start[r];
#pragma GCC unroll 4
      for (int s = 0; s < kSteps; ++s) {
        if (ahead) ask_eight<kSteps>(keys.ahead + (from + 8 * half) * keys.by, keys.by, s);
#pragma GCC unroll 2
        for (int g = 0; g < 2; ++g) {
          __m512i x[4];
          four_keys(k + (8 * half + 4 * g) * keys.by + s * kBytes, keys.by, x);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            x[i] = _mm512_xor_si512(x[i], _mm512_set1_epi8((char)-128));
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
              for (int plane = 0; plane < 2; ++plane)
                acc[plane][r][g] = _mm512_dpbusd_epi32(acc[plane][r][g], x[i], rows.q[plane][r][s][i]);
          }
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int g = 0; g < 2; ++g)
          sum[r][2 * half + g] = _mm512_add_epi32(_mm512_slli_epi32(acc[0][r][g], 8), acc[1][r][g]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      to[r] = (vf)_mm512_cvtepi32_ps(sums_of_quarters(
          sum[r], [](__m512i a, __m512i b) __attribute__((always_inline)) { return _mm512_add_epi32(a, b); }));
  }
};

// Weights of kKeys keys of a row as upper and lower bytes, and what they are worth.
struct ByteWeights {
  alignas(64) uint8_t bytes[2][kKeys];
  float by;

  BK_INLINE void put(ByteWeights& w, const vf* p) {
    vi most{};
    for (int i = 0; i < kKeys / W; ++i) most = larger_magnitude(p[i], most);
    const WholeScale s(most, 65535);
    w.by = s.from;
    for (int i = 0; i < kKeys / W; ++i) {
      const __m512i x = whole(p[i] * s.to);
      write(w.bytes[0] + i * W, _mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 8)));
      write(w.bytes[1] + i * W, _mm512_cvtepi32_epi8(x));
    }
  }
};

// R rows of weights times 64 elements of kKeys values. Bytes of four keys become neighbours; by two passes, for whose
// sums there are registers: of the first and of the last 8 elements of each quarter.
template <int R>
BK_INLINE void byte_sums(const Layout& n, const ByteWeights* w, const Line& values, int64_t from, float* acc,
                         const float* factor, bool ahead) {
  __m512i part[R][4];
#pragma GCC unroll 2
  for (int pass = 0; pass < 2; ++pass) {
    __m512i total[2][R][2];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 4; ++i) total[i / 2][r][i % 2] = _mm512_setzero_si512();
    const char *v = values.first + from, *next = values.ahead + from;
    for (int64_t t = 0; t < kKeys; t += 4, v += 4 * values.by, next += 4 * values.by) {
      if (ahead && pass == 0)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) ask(next + i * values.by);
      auto two = [&](const char* p) __attribute__((always_inline)) {
        const __m512i a = read<__m512i>(p), b = read<__m512i>(p + values.by);
        return pass == 0 ? _mm512_unpacklo_epi8(a, b) : _mm512_unpackhi_epi8(a, b);
      };
      const __m512i ab = two(v), cd = two(v + 2 * values.by);
      const __m512i x[2] = {_mm512_unpacklo_epi16(ab, cd), _mm512_unpackhi_epi16(ab, cd)};
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int plane = 0; plane < 2; ++plane) {
          const __m512i four = _mm512_set1_epi32(read<int32_t>(w[r].bytes[plane] + t));
#pragma GCC unroll 2
          for (int i = 0; i < 2; ++i) total[plane][r][i] = _mm512_dpbusd_epi32(total[plane][r][i], four, x[i]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i)
        part[r][2 * pass + i] = _mm512_add_epi32(_mm512_slli_epi32(total[0][r][i], 8), total[1][r][i]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    float* to = acc + r * n.acc_width;
    auto add = [&](int i, __m512i x) __attribute__((always_inline)) {
      store(to + i * W, load(to + i * W) * factor[r] + (vf)_mm512_cvtepi32_ps(x) * w[r].by);
    };
    const __m512i a = _mm512_shuffle_i32x4(part[r][0], part[r][1], 0x44),
                  b = _mm512_shuffle_i32x4(part[r][0], part[r][1], 0xee),
                  c = _mm512_shuffle_i32x4(part[r][2], part[r][3], 0x44),
                  d = _mm512_shuffle_i32x4(part[r][2], part[r][3], 0xee);
    add(0, _mm512_shuffle_i32x4(a, c, 0x88)), add(1, _mm512_shuffle_i32x4(a, c, 0xdd));
    add(2, _mm512_shuffle_i32x4(b, d, 0x88)), add(3, _mm512_shuffle_i32x4(b, d, 0xdd));
  }
}

// Whether weights times the values' scales are unsigned, as they are unless somebody has made other scales.
BK_INLINE bool unsigned_scales(const float* scales, int64_t count) {
  __mmask16 below = 0;
  for (int64_t t = 0; t < count; t += W) below |= _mm512_movepi32_mask((__m512i)load(scales + t));
  return below == 0;
}

template <int R, int kSteps, bool kDense>
void byte_rows(const Layout& n, const float* q, const State& state, int64_t row, Line keys, Line values, int64_t count,
               int64_t dv, float scale, bool ahead) {
  if constexpr (kDense) dv = keys.by = values.by = kSteps * kBytes;
  const ByteRows<R, kSteps> rows(q, n.d, scale);
  alignas(64) float s[R * kKeys];
  ByteWeights w[R];
  float factor[R];
  for (int64_t key = 0; key < count; key += kKeys, keys.move(kKeys), values.move(kKeys)) {
    for (int64_t t = 0; t < kKeys; t += W) {
      vf x[R];
      ByteRows<R, kSteps>::products(rows, keys, t, ahead, x);
      const vf by = load(keys.scale + t);
      for (int r = 0; r < R; ++r) store(s + r * kKeys + t, x[r] * (by * rows.by[r]));
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      vf p[kKeys / W];
      for (int i = 0; i < kKeys / W; ++i) p[i] = load(s + r * kKeys + i * W);
      line_weights<kKeys / W>(state, row + r, p, factor + r);
      for (int i = 0; i < kKeys / W; ++i) p[i] *= load(values.scale + i * W);
      ByteWeights::put(w[r], p);
    }
    for (int64_t e = 0; e < dv; e += kBytes)
      byte_sums<R>(n, w, values, e, state.acc + row * n.acc_width + e, factor, ahead);
  }
}

// All rows of a head, as line_block.
BK_INLINE void byte_block(const Layout& n, const char* q, const State& state, const Line& keys, const Line& values,
                          int64_t count, int64_t d, int64_t dv, float scale) {
  for_any_rows(n.rows, [&](auto tile, int64_t r) __attribute__((always_inline)) {
    constexpr int R = decltype(tile)::value;
    const float* rows = (const float*)(q + r * n.q_row);
    auto call = [&](auto steps) __attribute__((always_inline)) {
      constexpr int kSteps = decltype(steps)::value;
      if (d == dv && keys.by == d && values.by == d)
        byte_rows<R, kSteps, true>(n, rows, state, r, keys, values, count, dv, scale, r == 0);
      else
        byte_rows<R, kSteps, false>(n, rows, state, r, keys, values, count, dv, scale, r == 0);
    };
    d == kBytes ? call(Number<1>()) : d == 2 * kBytes ? call(Number<2>()) : call(Number<kMostSteps>());
  });
}
#else
BK_INLINE bool by_bytes(int64_t, int64_t) { return false; }
BK_INLINE bool unsigned_scales(const float*, int64_t) { return false; }
BK_INLINE void byte_block(const Layout&, const char*, const State&, const Line&, const Line&, int64_t, int64_t, int64_t,
                          float) {}
#endif

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
