// Linear layers of 8-bit weights whose tokens are rounded to 8 bits as well: products of integers, exact, in the matrix
// unit's or the vector unit's own format.
#include "gemm.h"
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace bigkernels {
namespace BK_ISA {
namespace {

// Left: 32 tokens by kDeep of the depth, token after token. Right: kDeep of the depth by 32 columns, in two tiles of 16
// columns; a line of a tile holds kGroup neighbours of the depth for each column, in 32 bits.

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
struct Quads {
  typedef uint8_t Element;
  static constexpr int64_t kDeep = 64, kGroup = 4, kTile = 16 * 64, kBlock = 2 * kTile;
#if defined(__AMX_INT8__) || defined(__ARM_FEATURE_DOTPROD)
  static constexpr uint8_t kZero = 0;
#else
  static constexpr uint8_t kZero = 128;  // the vector unit takes one operand without a sign
#endif

  typedef uint8_t Bytes __attribute__((vector_size(W * 4)));

  BK_INLINE void put(uint8_t* row, const int8_t* x) {
    for (int i = 0; i < kDeep; i += 4 * W) write(row + i, read<Bytes>(x + i) ^ kZero);
  }
  BK_INLINE void transpose(const int8_t* codes, int64_t stride, uint8_t* to) { transpose16(codes, stride, to, 64); }
  BK_INLINE vi multiply_add(vi acc, vi left, vi right) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)left, (__m512i)right);
#elif defined(__ARM_FEATURE_DOTPROD)
    return (vi)vdotq_s32((int32x4_t)acc, (int8x16_t)left, (int8x16_t)right);
#else
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)left, (__m256i)right);
#endif
  }

#if defined(__AMX_INT8__)
  static void multiply(int32_t* c, int64_t ldc, const uint8_t* a, const uint8_t* b, int64_t count, int64_t,
                       bool accumulate) {
    asm volatile("" ::: "memory");
    if (accumulate) {
      _tile_loadd(0, c, ldc * 4);
      _tile_loadd(1, c + 16, ldc * 4);
      _tile_loadd(2, c + 16 * ldc, ldc * 4);
      _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (; count > 0; --count, a += kBlock, b += kBlock) {
      _tile_loadd(4, a, 64);
      _tile_loadd(5, a + kTile, 64);
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + kTile, 64);
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + 16, ldc * 4);
    _tile_stored(2, c + 16 * ldc, ldc * 4);
    _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
  }
  BK_INLINE void begin() { ::bigkernels::BK_ISA::Pairs<1>::begin(); }
  BK_INLINE void end() { _tile_release(); }
#else
  static void multiply(int32_t* c, int64_t ldc, const uint8_t* a, const uint8_t* b, int64_t count, int64_t rows,
                       bool accumulate) {
    constexpr int R = W == 16 ? 8 : 4, V = W == 4 ? 4 : 2;  // rows and vectors of columns whose sums are in registers
    for (int64_t r = 0; r < kSide && r < rows; r += R, a += R * kDeep, c += R * ldc)
      for (int64_t column = 0; column < kSide; column += V * W) {
        int32_t* to = c + column;
        vi acc[R][V];  // of 32-bit lanes by type: the compiler copies accumulators whose type is not the instruction's
        for (int i = 0; i < R; ++i)
          for (int v = 0; v < V; ++v) acc[i][v] = accumulate ? read<vi>(to + i * ldc + v * W) : vi{};
        const uint8_t *ak = a, *bk = b + column / 16 * kTile;
        for (int64_t k = 0; k < count; ++k, ak += kBlock, bk += kBlock)
          for (int e = 0; e < 16; ++e) {
            vi right[V];
            for (int v = 0; v < V; ++v) right[v] = read<vi>(bk + v * W / 16 * kTile + v * W % 16 * 4 + e * 64);
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i) {
              vi left = vi{} + read<int32_t>(ak + i * kDeep + 4 * e);
              for (int v = 0; v < V; ++v) acc[i][v] = multiply_add(acc[i][v], left, right[v]);
            }
          }
        for (int i = 0; i < R; ++i)
          for (int v = 0; v < V; ++v) write(to + i * ldc + v * W, acc[i][v]);
      }
  }
  BK_INLINE void begin() {}
  BK_INLINE void end() {}
#endif
};
typedef Quads Integers;
#else
struct Words {
  typedef int16_t Element;
  static constexpr int64_t kDeep = 32, kGroup = 2, kTile = 16 * 32, kBlock = 2 * kTile;
  static constexpr uint8_t kZero = 0;
  typedef int32_t vw __attribute__((vector_size(W * 4)));

  BK_INLINE void put(int16_t* row, const int8_t* x) {
    for (int i = 0; i < kDeep; ++i) row[i] = x[i];
  }
  BK_INLINE void transpose(const int8_t* codes, int64_t stride, int16_t* to) {
    int16_t wide[16][32];
    for (int r = 0; r < 16; ++r) put(wide[r], codes + r * stride);
    transpose16(wide, 64, to, 64);
  }
  BK_INLINE vw multiply_add(vw acc, vw a, vw b) {
#if defined(__AVX2__)
    return acc + (vw)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
    return acc + (vw)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return acc + (a >> 16) * (b >> 16) + (a << 16 >> 16) * (b << 16 >> 16);
#endif
  }
  static void multiply(int32_t* c, int64_t ldc, const int16_t* a, const int16_t* b, int64_t count, int64_t rows,
                       bool accumulate) {
    constexpr int R = 4, V = 16 / W;
    for (int64_t r = 0; r < kSide && r < rows; r += R)
      for (int half = 0; half < 2; ++half) {
        int32_t* to = c + r * ldc + half * 16;
        vw acc[R][V];
        for (int i = 0; i < R; ++i)
          for (int v = 0; v < V; ++v) acc[i][v] = accumulate ? read<vw>(to + i * ldc + v * W) : vw{};
        for (int64_t k = 0; k < count; ++k) {
          const int16_t *left = a + k * kBlock + r * kDeep, *right = b + k * kBlock + half * kTile;
          for (int e = 0; e < 16; ++e) {
            vw columns[V];
            for (int v = 0; v < V; ++v) columns[v] = read<vw>(right + e * 32 + v * 2 * W);
#pragma GCC unroll 4
            for (int i = 0; i < R; ++i) {
              vw pair = vw{} + read<int32_t>(left + i * kDeep + 2 * e);
#pragma GCC unroll 4
              for (int v = 0; v < V; ++v) acc[i][v] = multiply_add(acc[i][v], pair, columns[v]);
            }
          }
        }
        for (int i = 0; i < R; ++i)
          for (int v = 0; v < V; ++v) write(to + i * ldc + v * W, acc[i][v]);
      }
  }
  BK_INLINE void begin() {}
  BK_INLINE void end() {}
};
typedef Words Integers;
#endif

typedef Integers::Element E;
constexpr int64_t kChunk = 512 / Integers::kDeep;  // blocks of the depth that are packed at once

constexpr int64_t deep_blocks(int64_t k) { return (k + Integers::kDeep - 1) / Integers::kDeep; }
constexpr int64_t row_block_bytes(int64_t k) { return deep_blocks(k) * Integers::kBlock * (int64_t)sizeof(E); }

// A token rounded to 8 bits: returns its scale, and zeros and NaN where a value is not finite.
template <class T>
float round_token(const T* x, int64_t k, int8_t* to) {
  vi most{};
  auto each = [&](auto f) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + W <= k; i += W) f(load(x + i), i, W);
    if (i < k) f(load(x + i, k - i), i, k - i);
  };
  // As integers magnitudes keep their order, those of infinity and NaN too.
  each([&](vf v, int64_t, int64_t) __attribute__((always_inline)) {
    vi bits = (vi)vabs(v);
    most = (vi)select(bits > most, (vf)bits, (vf)most);
  });
  int32_t top = 0;
  for (int i = 0; i < W; ++i) top = most[i] > top ? most[i] : top;
  float largest;
  __builtin_memcpy(&largest, &top, sizeof largest);
  float scale = largest / 127.0f;
  bool finite = top < 0x7f800000;
  if (!finite || !(scale > 0)) {
    __builtin_memset(to, 0, k);
    return finite ? 0.0f : __builtin_nanf("");
  }
  each([&](vf v, int64_t i, int64_t n) __attribute__((always_inline)) {
    vf q = vmax(splat(-127.0f), vmin(splat(127.0f), v / scale));
    n == W ? store(to + i, q) : store(to + i, q, n);
  });
  return scale;
}

// Where block i of row block s is on the left: a chunk of the depth after the other, as in linear.cpp.
BK_INLINE int64_t left_at(int64_t s, int64_t i, int64_t row_blocks, int64_t all) {
  int64_t chunk = i / kChunk * kChunk, deep = all - chunk < kChunk ? all - chunk : kChunk;
  return (chunk * row_blocks + s * deep + i - chunk) * Integers::kBlock;
}

template <class T>
void pack(const Linear& a, int64_t begin, int64_t end, E* left, float* scales, int8_t* token) {
  int64_t all = deep_blocks(a.k), row_blocks = blocks(a.m);
  __builtin_memset(token, 0, all * Integers::kDeep);
  for (int64_t row = begin * kSide; row < end * kSide; ++row) {
    if (row < a.m) {
      scales[row] = round_token((const T*)a.in.data + row * a.in.stride, a.k, token);
    } else {
      __builtin_memset(token, 0, all * Integers::kDeep);
    }
    for (int64_t i = 0; i < all; ++i)
      Integers::put(left + left_at(row / kSide, i, row_blocks, all) + row % kSide * Integers::kDeep,
                    token + i * Integers::kDeep);
  }
}

// Block (16 rows of the weight from n, kDeep elements from k), and what its columns add up to.
void pack_right(const Linear& a, int64_t n, int64_t k, E* to) {
  int64_t rows = a.n - n < 16 ? a.n - n : 16, count = a.k - k < Integers::kDeep ? a.k - k : Integers::kDeep;
  const int8_t* from = (const int8_t*)a.codes + n * a.code_row + k;
  if (rows == 16 && count == Integers::kDeep) return Integers::transpose(from, a.code_row, to);
  alignas(64) int8_t part[16][Integers::kDeep] = {};
  for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(part[r], from + r * a.code_row, count);
  Integers::transpose(part[0], Integers::kDeep, to);
}

// The block of the result at (row, column), whose columns are too large by `sums`, to where it belongs.
template <class T>
void write_out(const Linear& a, const int32_t* c, const int32_t* sums, const float* scales, int64_t row,
               int64_t column) {
  const float* scale = (const float*)a.scale + column;
  vf by[kVectors], bias[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    int64_t count = a.n - column - v * W;
    by[v] = count >= W ? load(scale + v * W) : count > 0 ? load(scale + v * W, count) : vf{};
    bias[v] = !a.bias || count <= 0 ? vf{} : load(a.bias + column + v * W, count < W ? count : W);
  }
  T* to = (T*)a.out + row * a.n + column;
  for (int64_t r = row; r < row + kSide && r < a.m; ++r, to += a.n, c += kSide) {
    auto y = [&](int v) __attribute__((always_inline)) {
      vi whole = read<vi>(c + v * W) - read<vi>(sums + v * W);
      return __builtin_convertvector(whole, vf) * scales[r] * by[v] + bias[v];
    };
    int v = 0;
    if (a.stream)
      for (; v < kVectors && column + (v + 2) * W <= a.n; v += 2) stream2(to + v * W, y(v), y(v + 1));
    for (; v < kVectors; ++v) {
      int64_t count = a.n - column - v * W;
      if (count >= W)
        store(to + v * W, y(v));
      else if (count > 0)
        store(to + v * W, y(v), count);
    }
  }
}

// Block `half` of a column of blocks: 16 rows of the weight from n on, and what its columns are too large by.
BK_INLINE void pack_half(const Linear& a, int64_t n, int64_t k, E* to, int32_t* sums) {
  if (n < a.n) {
    pack_right(a, n, k, to);
  } else {
    __builtin_memset(to, 0, Integers::kTile * sizeof(E));
  }
  if constexpr (Integers::kZero != 0)
    for (int v = 0; v < 16; v += W) {
      vi sum = read<vi>(sums + v);
      for (int e = 0; e < 16; ++e)
        sum =
            Integers::multiply_add(sum, vi{} + (int32_t)(Integers::kZero * 0x01010101u), read<vi>(to + e * 64 + v * 4));
      write(sums + v, sum);
    }
}

}  // namespace

int64_t linear_dynamic_row_block_bytes(const Linear& a) { return row_block_bytes(a.k); }
int64_t linear_dynamic_token(const Linear& a) { return deep_blocks(a.k) * Integers::kDeep; }
int64_t linear_dynamic_workspace(const Linear& a, int64_t columns) {
  int64_t width = padded(columns);
  return padded(a.m) * width * 4 + width * 4 + kChunk * Integers::kBlock * (int64_t)sizeof(E);
}

void linear_dynamic_pack(const Linear& a, int64_t begin, int64_t end, void* left, float* scales, void* token) {
  by_type(a.type, [&](auto t) { pack<decltype(t)>(a, begin, end, (E*)left, scales, (int8_t*)token); });
}

void linear_dynamic(const Linear& a, const void* left, const float* scales, int64_t begin, int64_t end, void* memory) {
  int64_t wide = blocks(end - begin), all = deep_blocks(a.k), row_blocks = blocks(a.m);
  int32_t* c = (int32_t*)memory;
  int32_t* sums = c + row_blocks * wide * kSide * kSide;  // what the missing sign adds to each column
  E* right = (E*)(sums + wide * kSide);
  __builtin_memset(sums, 0, wide * kSide * 4);
  Integers::begin();
  for (int64_t d = 0; d < all; d += kChunk) {
    int64_t deep = all - d < kChunk ? all - d : kChunk;
    for (int64_t j = 0; j < wide; ++j) {
      int64_t column = begin + j * kSide;
      for (int64_t i = 0; i < deep; ++i)
        for (int half = 0; half < 2; ++half)
          pack_half(a, column + half * 16, (d + i) * Integers::kDeep,
                    right + i * Integers::kBlock + half * Integers::kTile, sums + j * kSide + half * 16);
      for (int64_t s = 0; s < row_blocks; ++s) {
        int32_t* block = c + (s * wide + j) * kSide * kSide;
        for (int64_t r = kSide * s / row_blocks; r < kSide * (s + 1) / row_blocks;
             ++r) {  // the next chunk is on its way
          const uint8_t* row = a.codes + (column + kSide + r) * a.code_row + d * Integers::kDeep;
          if (j + 1 < wide && column + kSide + r < a.n)
            for (int64_t i = 0; i < deep * Integers::kDeep; i += 64) __builtin_prefetch(row + i, 0, 2);
        }
        Integers::multiply(block, kSide, (const E*)left + left_at(s, d, row_blocks, all), right, deep, a.m - s * kSide,
                           d > 0);
        if (d + kChunk < all) continue;
        by_type(a.out_type,
                [&](auto t) { write_out<decltype(t)>(a, block, sums + j * kSide, scales, s * kSide, column); });
      }
    }
  }
  Integers::end();
  if (a.stream) fence();
}

}  // namespace BK_ISA
}  // namespace bigkernels
