// Decode attention's products of bfloat16 in tile registers, from the cache as it lies in memory: neither keys nor
// values are packed.
//
// A tile product adds up pairs, a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1]. Keys are the left side: their neighbouring
// elements are the pairs, as they should be. Values are the right side: there the pairs are neighbouring elements of
// one key, of which the weights (p, 0) take the first and (0, p) the second, so that each row of weights is two rows of
// a tile. Half of the multiplications are by zero; interleaving the values of two keys would cost more.
#pragma once
#include "decode_blocks.h"

#if defined(__AMX_BF16__)
namespace bigkernels {
namespace BK_ISA {
namespace {

// 32 elements as bfloat16, or the first n of them and zeros.
BK_INLINE __m512i load_32(const bf16* p, int64_t n) {
  return n >= 32 ? read<__m512i>(p) : _mm512_maskz_loadu_epi16((__mmask32)((uint64_t{1} << n) - 1), p);
}
BK_INLINE __m512i load_32(const int8_t* p, int64_t n) {
  __m256i x = n >= 32 ? read<__m256i>(p) : _mm256_maskz_loadu_epi8((__mmask32)((uint64_t{1} << n) - 1), p);
  __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(x)));
  __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(x, 1)));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// The 16 rows of a tile, 32 elements a time: where they lie, or copies.
struct TileRows {
  const char *data, *copies;
  int64_t step, copies_step, whole;  // steps in bytes; the first `whole` elements are where they lie
  const char* at(int64_t e) const { return e < whole ? data + e * 2 : copies + e * 2; }
  int64_t step_at(int64_t e) const { return e < whole ? step : copies_step; }
};

// `step`: between the rows, 0 where it varies. `to`: memory for the copies, 16 rows of `width` elements.
template <class C>
TileRows tile_rows(const char* const* tokens, int64_t count, int64_t step, int64_t at, int64_t elements, int64_t width,
                   char* to) {
  TileRows rows{tokens[0] + at, to, step, width * 2, 0};
  if (step && sizeof(C) == 2) rows.whole = elements / 32 * 32;
  for (int64_t e = rows.whole; e < elements; e += 32)
    for (int i = 0; i < 16; ++i) {
      __m512i x = i < count ? load_32((const C*)(tokens[i] + at) + e, elements - e) : _mm512_setzero_si512();
      write(to + i * width * 2 + e * 2, x);
    }
  return rows;
}

// s (rows, kKeys): rows of s from columns of t (16, 16).
BK_INLINE void put_columns(const float* t, float* s, int64_t rows) {
  for (int64_t r = 0; r < rows; r += 4) {
    __m512 x[4];
    for (int j = 0; j < 4; ++j) {
      const float* from = t + j * 16 + r;
      x[j] = _mm512_castps128_ps512(_mm_load_ps(from));
      x[j] = _mm512_insertf32x4(x[j], _mm_load_ps(from + 64), 1);
      x[j] = _mm512_insertf32x4(x[j], _mm_load_ps(from + 128), 2);
      x[j] = _mm512_insertf32x4(x[j], _mm_load_ps(from + 192), 3);
    }
    __m512d a = (__m512d)_mm512_unpacklo_ps(x[0], x[1]), b = (__m512d)_mm512_unpackhi_ps(x[0], x[1]);
    __m512d c = (__m512d)_mm512_unpacklo_ps(x[2], x[3]), d = (__m512d)_mm512_unpackhi_ps(x[2], x[3]);
    write(s + r * kKeys, _mm512_unpacklo_pd(a, c));
    write(s + (r + 1) * kKeys, _mm512_unpackhi_pd(a, c));
    write(s + (r + 2) * kKeys, _mm512_unpacklo_pd(b, d));
    write(s + (r + 3) * kKeys, _mm512_unpackhi_pd(b, d));
  }
}

template <class C>
struct Tiles {
  typedef C Cache;
  static constexpr int kVectors = 2, kRows = 2;
  static constexpr bool kLines = false;

  static Layout layout(const DecodeAttention& a, int64_t queries) {
    Layout n(a, queries, 32);
    n.acc_rows = n.rows <= 8 ? 2 * n.rows : padded(2 * n.rows, 16), n.acc_width = n.dv / 2;
    n.q_row = 0, n.q_head = n.padded_rows * n.d * 2;
    n.weights = padded(2 * n.rows, 16) * kKeys * sizeof(float);
    n.staging = kKeys * (n.d > n.dv ? n.d : n.dv) * 2;
    return n;
  }
  // The tile registers' shape belongs to the thread. 0 to 3 are for whole tiles; 4 to 7 have as many rows as there are
  // weights, if they are few: a product takes time by the row.
  static void begin(const Layout& n) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t columns[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.columns[i] = 64, config.rows[i] = i < 4 || n.acc_rows > 16 ? 16 : n.acc_rows;
    _tile_loadconfig(&config);
  }
  BK_INLINE void end() { _tile_release(); }

  // Queries on the right side: tiles of 16 rows, in each a tile for 32 elements, in that a line of pairs for each row.
  BK_INLINE void put_query(const Layout& n, char* q, int64_t r, int64_t e, vf x) {
    uint32_t* to = (uint32_t*)q + (r / 16 * n.d / 32 + e / 32) * 256 + e % 32 / 2 * 16 + r % 16;
    vh pairs = narrow(x, (const bf16*)nullptr);
    for (int i = 0; i < W / 2; ++i) to[i * 16] = read<uint32_t>((const char*)&pairs + 4 * i);
  }

  static void scores(const Layout& n, const char* q, const Block& b, int64_t at, int64_t d, float* s, char* staging,
                     Ahead& ahead) {
    alignas(64) float t[2][256];
    Ahead::begin(ahead, (b.count + 31) / 32 * (n.d / 32));
    for (int64_t k = 0; k < b.count; k += 32) {
      bool two = k + 16 < b.count;
      TileRows rows[2];
      for (int i = 0; i <= two; ++i)
        rows[i] = tile_rows<C>(b.k + k + 16 * i, b.count - k - 16 * i, b.k_step[k / 16 + i], at, d, n.d,
                               staging + i * 32 * n.d);
      asm volatile("" ::: "memory");  // the compiler does not know what the tile instructions read and write
      for (int64_t r = 0; r < n.rows; r += 16) {
        const char* right = q + r * n.d * 2;
        _tile_zero(0);
        _tile_zero(1);
        for (int64_t e = 0; e < n.d; e += 32, right += 1024) {
          if (r == 0) Ahead::step(ahead);
          _tile_loadd(3, right, 64);
          _tile_loadd(2, rows[0].at(e), rows[0].step_at(e));
          _tile_dpbf16ps(0, 2, 3);
          if (!two) continue;
          _tile_loadd(2, rows[1].at(e), rows[1].step_at(e));
          _tile_dpbf16ps(1, 2, 3);
        }
        _tile_stored(0, t[0], 64);
        _tile_stored(1, t[1], 64);
        asm volatile("" ::: "memory");
        int64_t part = n.rows - r < 16 ? n.rows - r : 16;
        put_columns(t[0], s + r * kKeys + k, part);
        if (two) put_columns(t[1], s + r * kKeys + k + 16, part);
      }
    }
  }

  BK_INLINE void put_weights(const Layout& n, float*, float* w, int64_t r, int64_t i, vf p) {
    __m512i first = _mm512_cvtepu16_epi32((__m256i)narrow(p, (const bf16*)nullptr));
    write(w + r * kKeys + i, first);
    write(w + (n.rows + r) * kKeys + i, _mm512_slli_epi32(first, 16));
  }

  static void weigh(const Layout& n, const float*, const float* w, const Block& b, int64_t at, int64_t dv, float* acc,
                    const float* factor, char* staging, Ahead& ahead) {
    for (int64_t m = 0; m < 2 * n.rows; ++m) {
      float f = factor[m < n.rows ? m : m - n.rows];
      if (f == 1) continue;
      for (int64_t e = 0; e < n.acc_width; e += W)
        store(acc + m * n.acc_width + e, load(acc + m * n.acc_width + e) * f);
    }
    TileRows rows[kKeys / 16];
    for (int64_t k = 0; k < b.count; k += 16)
      rows[k / 16] = tile_rows<C>(b.v + k, b.count - k, b.v_step[k / 16], at, dv, n.dv, staging + k * n.dv * 2);
    asm volatile("" ::: "memory");
    const int64_t line = n.acc_width * sizeof(float);
    Ahead::begin(ahead, (n.dv + 63) / 64 * ((b.count + 15) / 16));
    for (int64_t m = 0; m < 2 * n.rows; m += 16)
      for (int64_t e = 0; e < n.dv; e += 64) {
        bool two = e + 32 < n.dv;
        float* to = acc + m * n.acc_width + e / 2;
        _tile_loadd(6, to, line);
        if (two) _tile_loadd(7, to + 16, line);
        for (int64_t k = 0; k < b.count; k += 16) {
          if (m == 0) Ahead::step(ahead);
          const TileRows& from = rows[k / 16];
          _tile_loadd(4, w + m * kKeys + k, kKeys * sizeof(float));
          _tile_loadd(2, from.at(e), from.step_at(e));
          _tile_dpbf16ps(6, 4, 2);
          if (!two) continue;
          _tile_loadd(3, from.at(e + 32), from.step_at(e + 32));
          _tile_dpbf16ps(7, 4, 3);
        }
        _tile_stored(6, to, line);
        if (two) _tile_stored(7, to + 16, line);
      }
    asm volatile("" ::: "memory");
  }

  BK_INLINE void row(const Layout& n, const float* acc, int64_t r, int64_t e, vf* x) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    __m512 even = (__m512)load(acc + r * n.acc_width + e / 2);
    __m512 odd = (__m512)load(acc + (n.rows + r) * n.acc_width + e / 2);
    x[0] = (vf)_mm512_permutex2var_ps(even, low, odd);
    x[1] = (vf)_mm512_permutex2var_ps(even, high, odd);
  }
};

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
#endif
