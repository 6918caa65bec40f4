// The GEMM micro-kernel: products of operands that were packed in blocks, at every ISA level, of every storage type.
//
// All sizes are in blocks of 32. A left operand is (M / 32, K / 32) blocks, a right operand (N / 32, K / 32) blocks,
// each block contiguous; the result is a row-major float32 matrix. A format says what a block looks like:
//
//   Pairs<P>  bfloat16 in P planes whose sum is the value, for instructions that add the products of pairs: P = 1 holds
//             bfloat16, 2 float16 and 3 float32 without loss. A float32 product costs six of bfloat16, less than half
//             of what the vector units take for it; a float16 product costs four.
//   Floats    float32, for multiply-adds.
//
// A block on the left is 32 rows by 32 of the depth; on the right 32 of the depth by 32 columns. The order within the
// depth is free as long as both sides agree: "natural" has pairs (2i, 2i + 1), "split" pairs (i, i + 16), which vector
// registers of 16 make without shuffling. A product is told how many elements of the depth, rows and columns are in
// use, and leaves out what it can of the others: a depth that ends within a block must be in natural order.
#pragma once
#include <bigkernels/math.h>

namespace bigkernels {
namespace BK_ISA {
namespace {

constexpr int kSide = 32;
constexpr int kVectors = kSide / W;  // a row of a block

constexpr int64_t blocks(int64_t n) { return (n + kSide - 1) / kSide; }
constexpr int64_t padded(int64_t n) { return blocks(n) * kSide; }

// Hands out parts of the workspace, each from a cache line on.
struct Workspace {
  char* next;
  template <class E>
  E* take(int64_t count) {
    E* p = (E*)next;
    next += (count * (int64_t)sizeof(E) + 63) / 64 * 64;
    return p;
  }
};

// Row r of a matrix whose columns are contiguous; null for a row of zeros.
template <class T>
struct StridedRows {
  const T* first;
  int64_t stride, count;
  BK_INLINE const T* get(const StridedRows& s, int64_t r) { return r < s.count ? s.first + r * s.stride : nullptr; }
};

// Transposes 16 rows of 16 32-bit lanes.
#if defined(__AVX512F__)
BK_INLINE void transpose16(const void* from, int64_t from_bytes, void* to, int64_t to_bytes) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = read<__m512i>((const char*)from + i * from_bytes);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
    b[4 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    b[8 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    b[12 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    write((char*)to + i * to_bytes, _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88));
    write((char*)to + (4 + i) * to_bytes, _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0x88));
    write((char*)to + (8 + i) * to_bytes, _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd));
    write((char*)to + (12 + i) * to_bytes, _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0xdd));
  }
}
#else
BK_INLINE void transpose16(const void* from, int64_t from_bytes, void* to, int64_t to_bytes) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j)
      __builtin_memcpy((char*)to + j * to_bytes + i * 4, (const char*)from + i * from_bytes + j * 4, 4);
}
#endif

// ---- float32 --------------------------------------------------------------------------------------------------------

struct Floats {
  typedef float Element;
  static constexpr int64_t kBlock = kSide * kSide;

  // A block from 32 rows of up to 32 values; what is outside is zero.
  template <class T, class Row>
  BK_INLINE void stage(float* block, const Row& rows, int64_t row, int64_t column, int64_t columns) {
    for (int r = 0; r < kSide; ++r) {
      const T* from = Row::get(rows, row + r);
      float* to = block + r * kSide;
      int64_t n = from ? columns - column : 0;
      for (int v = 0; v < kVectors; ++v, n -= W)
        store(to + v * W, n >= W ? load(from + column + v * W) : n > 0 ? load(from + column + v * W, n) : vf{});
    }
  }
  // Whether staging is no more than copying.
  template <class T>
  static constexpr bool holds() {
    return sizeof(T) == sizeof(float);
  }
  BK_INLINE void transpose(float* to, const float* from, int64_t line) {
    for (int i = 0; i < kSide; i += 16)
      for (int j = 0; j < kSide; j += 16) transpose16(from + i * line + j, line * 4, to + j * kSide + i, kSide * 4);
  }
  // From a staged block X (32 tokens, 32 elements): X^T on the right (depth: elements), X on the right, X^T on the left
  // (depth: tokens, split order). `line` is from row to row: a format that holds a type takes blocks where they are.
  BK_INLINE void right_transposed(float* to, const float* staged, int64_t line = kSide) { transpose(to, staged, line); }
  BK_INLINE void right(float* to, const float* staged, int64_t line = kSide) {
    for (int r = 0; r < kSide; ++r) __builtin_memcpy(to + r * kSide, staged + r * line, kSide * 4);
  }
  BK_INLINE void left_transposed(float* to, const float* staged) { transpose(to, staged, kSide); }

  // Row r of a block on the left, depth in split order.
  BK_INLINE void put_left(float* block, int r, const vf* x) {
    for (int v = 0; v < kVectors; ++v) store(block + r * kSide + v * W, x[v]);
  }
  // Rows r and r + 16 of a block on the right, r < 16, depth in split order.
  BK_INLINE void put_right(float* block, int r, const vf* x, const vf* y) {
    put_left(block, r, x);
    put_left(block, r + 16, y);
  }

  template <int kRows, int kColumns>
  BK_INLINE void rows_of(float* c, int64_t ldc, const float* a, const float* b, int64_t depth, bool accumulate) {
    constexpr int V = kColumns / W;
    vf acc[kRows][V];
    // A call's terms are summed by themselves: float32 keeps more digits of a long sum in two levels.
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < V; ++v) acc[i][v] = vf{};
    for (; depth > 0; depth -= kSide, a += kBlock, b += kBlock) {
      int64_t elements = depth < kSide ? depth : kSide;
      for (int64_t e = 0; e < elements; ++e) {
        vf right[V];
        for (int v = 0; v < V; ++v) right[v] = load(b + e * kSide + v * W);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          vf left = splat(a[i * kSide + e]);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) acc[i][v] += left * right[v];
        }
      }
    }
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < V; ++v) {
        float* at = c + i * ldc + v * W;
        store(at, accumulate ? load(at) + acc[i][v] : acc[i][v]);
      }
  }

  // C (32, 32) = or += the products over `depth` elements. Rows and columns that are not in use may be left as they
  // are.
  static inline void multiply(float* c, int64_t ldc, const float* a, const float* b, int64_t depth, int64_t rows,
                              int64_t columns, bool accumulate) {
    constexpr int R = W == 16 ? 8 : W == 8 ? 4 : 4;
    for (int r = 0; r < kSide && r < rows; r += R) {
      if (W < 16 || columns <= 16) {
        for (int j = 0; j < kSide && j < columns; j += 16)
          rows_of<R, 16>(c + r * ldc + j, ldc, a + r * kSide, b + j, depth, accumulate);
      } else {
        rows_of<R, 32>(c + r * ldc, ldc, a + r * kSide, b, depth, accumulate);
      }
    }
  }
  BK_INLINE void begin() {}
  BK_INLINE void end() {}
  static constexpr bool kInSteps = false;
};

// ---- bfloat16 pairs -------------------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)

// Rounds to bfloat16 in the upper half of each lane. Ties go away from zero, which costs one operation and not four.
BK_INLINE __m512i round_up_half(vf x) { return _mm512_add_epi32((__m512i)x, _mm512_set1_epi32(0x8000)); }
// The upper halves of two vectors as pairs (x[i], y[i]).
BK_INLINE __m512i pair(__m512i x, __m512i y) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(x, 16), y);
}

template <int P>
struct Pairs {
  typedef uint16_t Element;
  static constexpr int64_t kPlane = kSide * kSide;
  static constexpr int64_t kBlock = P * kPlane;
  // A plane of a block is two tiles of 16 lines of 64 bytes: on the left rows 0-15 and 16-31, on the right columns.
  static constexpr int64_t kTile = 512;
  // Of three planes six of nine products are made: the others are below float32's rounding.

  // Planes of x, in the upper halves of the lanes. Three of them are cut off and not rounded: nothing overflows.
  BK_INLINE void split(vf x, __m512i* planes) {
    for (int p = 0; p < P; ++p) {
      __m512i bits = P == 3 ? (__m512i)x : round_up_half(x);
      planes[p] = bits;
      if (p + 1 < P) x = x - (vf)_mm512_and_epi32(bits, _mm512_set1_epi32(0xffff0000));
    }
  }

  template <class T, class Row>
  BK_INLINE void stage(uint16_t* block, const Row& rows, int64_t row, int64_t column, int64_t columns) {
    for (int r = 0; r < kSide; ++r) {
      const T* from = Row::get(rows, row + r);
      uint16_t* to = block + r * kSide;
      int64_t n = from ? columns - column : 0;
      if constexpr (P == 1 && sizeof(T) == 2) {  // bfloat16 as it is
        __m512i line = _mm512_setzero_si512();
        if (n >= kSide)
          line = read<__m512i>(from + column);
        else if (n > 0)
          line = _mm512_maskz_loadu_epi16((1u << n) - 1, from + column);
        write(to, line);
        continue;
      }
      __m512i low[P], high[P];
      split(n >= W ? load(from + column) : n > 0 ? load(from + column, n) : vf{}, low);
      n -= W;
      split(n >= W ? load(from + column + W) : n > 0 ? load(from + column + W, n) : vf{}, high);
      for (int p = 0; p < P; ++p) {
        __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(low[p], 16))),
                                          _mm512_cvtepi32_epi16(_mm512_srli_epi32(high[p], 16)), 1);
        write(to + p * kPlane, both);
      }
    }
  }
  template <class T>
  static constexpr bool holds() {
    return P == 1;
  }
  BK_INLINE void right_transposed(uint16_t* to, const uint16_t* staged, int64_t line = kSide) {
    for (int t = 0; t < 2 * P; ++t) transpose16(staged + t * 16 * line, line * 2, to + t * kTile, 64);
  }
  BK_INLINE void right(uint16_t* to, const uint16_t* staged, int64_t line = kSide) {
    for (int p = 0; p < P; ++p)
      for (int t = 0; t < 2; ++t)
        for (int i = 0; i < 16; ++i) {
          const uint16_t* from = staged + p * kPlane + i * line + 16 * t;
          __m512i x = _mm512_cvtepu16_epi32(read<__m256i>(from)),
                  y = _mm512_cvtepu16_epi32(read<__m256i>(from + 16 * line));
          write(to + p * kPlane + t * kTile + i * 32, _mm512_or_epi32(x, _mm512_slli_epi32(y, 16)));
        }
  }
  BK_INLINE void left_transposed(uint16_t* to, const uint16_t* staged) {
    alignas(64) uint16_t lines[kBlock];
    right(lines, staged);
    for (int t = 0; t < 2 * P; ++t) transpose16(lines + t * kTile, 64, to + t * kTile, 64);
  }

  BK_INLINE void put_left(uint16_t* block, int r, const vf* x) {
    __m512i low[P], high[P];
    split(x[0], low);
    split(x[1], high);
    for (int p = 0; p < P; ++p) write(block + p * kPlane + r * kSide, pair(low[p], high[p]));
  }
  BK_INLINE void put_right(uint16_t* block, int r, const vf* x, const vf* y) {
    for (int t = 0; t < 2; ++t) {
      __m512i even[P], odd[P];
      split(x[t], even);
      split(y[t], odd);
      for (int p = 0; p < P; ++p) write(block + p * kPlane + t * kTile + r * 32, pair(even[p], odd[p]));
    }
  }

#if defined(__AMX_BF16__)
  // One product in steps: `start`, `add` for each block of the depth, `put`. In between, vector code may run.
  BK_INLINE void start(const float* c, int64_t ldc, int columns, bool accumulate) {
    if (!accumulate) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      return;
    }
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(2, c + 16 * ldc, ldc * 4);
    if (columns != kSide) return;
    _tile_loadd(1, c + 16, ldc * 4);
    _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
  }
  BK_INLINE void left_tiles(const uint16_t* a) {
    _tile_loadd(4, a, 64);
    _tile_loadd(5, a + kTile, 64);
  }
  BK_INLINE void right_tiles(const uint16_t* b, int columns) {
    _tile_loadd(6, b, 64);
    if (columns == kSide) _tile_loadd(7, b + kTile, 64);
  }
  BK_INLINE void products(int columns) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if (columns != kSide) return;
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  BK_INLINE void add(const uint16_t* a, const uint16_t* b, int columns) {
    // From product to product one operand stays: loads take as long as products where neighbours share the core.
    if constexpr (P == 1) {
      left_tiles(a), right_tiles(b, columns), products(columns);
    } else if constexpr (P == 2) {
      left_tiles(a), right_tiles(b + kPlane, columns), products(columns);
      left_tiles(a + kPlane), products(columns);
      right_tiles(b, columns), products(columns);
      left_tiles(a), products(columns);
    } else {
      left_tiles(a), right_tiles(b + 2 * kPlane, columns), products(columns);
      right_tiles(b + kPlane, columns), products(columns);
      left_tiles(a + kPlane), products(columns);
      right_tiles(b, columns), products(columns);
      left_tiles(a + 2 * kPlane), products(columns);
      left_tiles(a), products(columns);
    }
  }
  // A quarter of `add`, so that a few vector instructions fit between two tile instructions.
  template <int kQuarter>
  BK_INLINE void add_quarter(const uint16_t* a, const uint16_t* b, int columns) {
    if (P > 1) {
      if (kQuarter == 0) add(a, b, columns);
    } else if (kQuarter == 0) {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
    } else if (kQuarter == 1) {
      _tile_loadd(5, a + kTile, 64);
      _tile_dpbf16ps(2, 5, 6);
    } else if (columns != kSide) {
    } else if (kQuarter == 2) {
      _tile_loadd(7, b + kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
    } else {
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  BK_INLINE void put(float* c, int64_t ldc, int columns) {
    _tile_stored(0, c, ldc * 4);
    _tile_stored(2, c + 16 * ldc, ldc * 4);
    if (columns != kSide) return;
    _tile_stored(1, c + 16, ldc * 4);
    _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
  }
  static inline void multiply(float* c, int64_t ldc, const uint16_t* a, const uint16_t* b, int64_t depth, int64_t,
                              int64_t columns, bool accumulate) {
    asm volatile("" ::: "memory");  // the compiler does not know what the tile instructions read
    int n = columns > 16 ? kSide : 16;
    // A call's terms are summed by themselves where digits count, as in Floats.
    bool apart = P > 1 && accumulate;
    start(c, ldc, n, accumulate && !apart);
    for (int64_t k = 0; k < blocks(depth); ++k) add(a + k * kBlock, b + k * kBlock, n);
    if (!apart) return put(c, ldc, n);
    alignas(64) float sums[kSide * kSide];
    put(sums, kSide, n);
    asm volatile("" ::: "memory");
    for (int r = 0; r < kSide; ++r, c += ldc)
      for (int v = 0; v < n; v += W) store(c + v, load(c + v) + load(sums + r * kSide + v));
  }
  static constexpr bool kInSteps = true;
  // The tile registers' shape belongs to the thread: set before the first product and given back after the last.
  BK_INLINE void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t columns[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.columns[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
  }
  BK_INLINE void end() { _tile_release(); }
#else
  template <int V>
  BK_INLINE void rows_of(float* c, int64_t ldc, const uint16_t* a, const uint16_t* b, int64_t depth, bool accumulate) {
    constexpr int R = 8;
    vf acc[R][V];
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < V; ++v) acc[i][v] = accumulate ? load(c + i * ldc + v * W) : vf{};
    for (; depth > 0; depth -= kSide, a += kBlock, b += kBlock) {
      int64_t pairs = depth < kSide ? (depth + 1) / 2 : kSide / 2;
      for (int64_t e = 0; e < pairs; ++e) {
        __m512bh right[V];
        for (int v = 0; v < V; ++v) right[v] = (__m512bh)read<__m512i>(b + v * kTile + e * 32);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
          __m512bh left = (__m512bh)_mm512_set1_epi32(read<int32_t>(a + i * kSide + 2 * e));
          for (int v = 0; v < V; ++v) acc[i][v] = (vf)_mm512_dpbf16_ps((__m512)acc[i][v], left, right[v]);
        }
      }
    }
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < V; ++v) store(c + i * ldc + v * W, acc[i][v]);
  }
  static inline void multiply(float* c, int64_t ldc, const uint16_t* a, const uint16_t* b, int64_t depth, int64_t rows,
                              int64_t columns, bool accumulate) {
    static_assert(P == 1, "planes pay with tiles only");
    for (int r = 0; r < kSide && r < rows; r += 8) {
      if (columns > 16)
        rows_of<2>(c + r * ldc, ldc, a + r * kSide, b, depth, accumulate);
      else
        rows_of<1>(c + r * ldc, ldc, a + r * kSide, b, depth, accumulate);
    }
  }
  BK_INLINE void begin() {}
  BK_INLINE void end() {}
  static constexpr bool kInSteps = false;
#endif
};
#endif

// Products that wait to be made while vector code runs. The tile unit works beside the vector units only where its
// instructions stand among theirs, a few dozen apart: the processor does not look far enough ahead to mix longer runs.
// Where products come whole, nothing is mixed.
template <class F>
class Queue {
 public:
  typedef typename F::Element E;
  static constexpr bool kMixes = F::kInSteps;

  void clear() { count_ = at_ = 0, left_ = 0, k_ = 0; }
  void push(float* c, int64_t ldc, const E* a, const E* b, int64_t depth, int64_t columns, bool accumulate) {
    if (count_ == kMost) finish(), clear();
    jobs_[count_++] = {c, ldc, a, b, depth, columns > 16 ? kSide : 16, accumulate};
    left_ += blocks(depth);
  }
  // Blocks of the depth that are left.
  int64_t left() const { return left_; }

  // One block of the depth in four quarters: begin, quarter<0..3>, end. False where nothing is left.
  inline __attribute__((always_inline)) bool begin() {
    if (at_ == count_) return false;
    if (k_ == 0) F::start(jobs_[at_].c, jobs_[at_].ldc, jobs_[at_].columns, jobs_[at_].accumulate);
    return true;
  }
  template <int kQuarter>
  inline __attribute__((always_inline)) void quarter() const {
    F::template add_quarter<kQuarter>(jobs_[at_].a + k_ * F::kBlock, jobs_[at_].b + k_ * F::kBlock, jobs_[at_].columns);
  }
  inline __attribute__((always_inline)) void end() {
    --left_;
    if (++k_ < blocks(jobs_[at_].depth)) return;
    F::put(jobs_[at_].c, jobs_[at_].ldc, jobs_[at_].columns);
    k_ = 0, ++at_;
  }

  void finish() {
    if constexpr (kMixes) {
      asm volatile("" ::: "memory");
      while (begin()) {
        F::add(jobs_[at_].a + k_ * F::kBlock, jobs_[at_].b + k_ * F::kBlock, jobs_[at_].columns);
        end();
      }
    } else {
      for (; at_ < count_; ++at_) {
        const Job& j = jobs_[at_];
        F::multiply(j.c, j.ldc, j.a, j.b, j.depth, kSide, j.columns, j.accumulate);
      }
    }
  }

 private:
  static constexpr int kMost = 64;
  struct Job {
    float* c;
    int64_t ldc;
    const E *a, *b;
    int64_t depth;  // elements
    int columns;    // 16 or 32
    bool accumulate;
  } jobs_[kMost];
  int count_ = 0, at_ = 0;
  int64_t left_ = 0, k_ = 0;
};

// The fastest format for a storage type at this ISA level.
template <class T>
struct FormatOf {
  typedef Floats type;
};
#if defined(__AMX_BF16__)
template <>
struct FormatOf<float> {
  typedef Pairs<3> type;
};
template <>
struct FormatOf<f16> {
  typedef Pairs<2> type;
};
#endif
#if defined(__AVX512BF16__)
template <>
struct FormatOf<bf16> {
  typedef Pairs<1> type;
};
#endif

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
