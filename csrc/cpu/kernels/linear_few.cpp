// Linear layers, a few tokens: the weight is read once, as it is stored, and that is what takes the time. Rows of the
// weight lie along the vectors, so that a row's scales come one a group and its sum one a row.
#include "linear_tiles.h"
#include "product_tokens.h"

namespace bigkernels {
namespace BK_ISA {

int64_t product_ready(const Weight&, int32_t, int64_t);
void product_prepare(const Weight&, int32_t, const float*, int64_t, int64_t, int64_t, int64_t, void*);
void product(const Weight&, int32_t, const void*, int64_t, int64_t, int64_t, float*, int64_t, void*);

namespace {

constexpr int64_t kBlock = 128;  // elements: what 64 bytes of 4-bit codes hold
constexpr int kRows = 4;         // of the weight, and tokens, that share a pass
constexpr int kTokens = 4;

constexpr int64_t whole(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

// y for R rows of the weight and T tokens.
template <int R, int T>
struct Tile {
  vf total[R][T] = {};

  BK_INLINE void put(const Linear& a, const Tile& tile, int64_t n, int64_t token) {
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < R; ++r) {
        float y = sum(tile.total[r][t]);
        if (a.bias) y += a.bias[n + r];
        int64_t at = (token + t) * a.n + n + r;
        switch (a.out_type) {
          case Type::f32: ((float*)a.out)[at] = y; break;
          case Type::bf16: store((bf16*)a.out + at, splat(y), 1); break;
          case Type::f16: store((f16*)a.out + at, splat(y), 1); break;
        }
      }
  }
};

// ---- float32 multiply-adds: any weight, any level -------------------------------------------------------------------

// x in float32, zero from the end of a row on. For 4-bit codes each 2 W elements are those of even number, then the odd
// ones: a vector of bytes gives both kinds without a shuffle.
template <class X>
void widen_tokens(const Linear& a, float* to) {
  constexpr int64_t step = 2 * W;
  for (int64_t m = 0; m < a.m; ++m) {
    const X* x = (const X*)a.in.data + m * a.in.stride;
    for (int64_t k = 0; k < whole(a.k); k += step, to += step) {
      float part[step] = {};
      for (int i = 0; i < step; i += W) {
        int64_t left = a.k - k - i;
        if (left > 0) store(part + i, left >= W ? load(x + k + i) : load(x + k + i, left));
      }
      if (packed(a))
        for (int i = 0; i < W; ++i) to[i] = part[2 * i], to[W + i] = part[2 * i + 1];
      else
        __builtin_memcpy(to, part, sizeof part);
    }
  }
}

// What a row holds from element k on, before its scale.
template <Codes kKind>
struct Reader {
  static constexpr bool kPacked = is_packed(kKind);
  static constexpr bool kScaled = kKind > Codes::f16;
  static constexpr int kVectors = kPacked ? 2 : 1, kStep = kVectors * W;

  static constexpr int64_t bytes(int64_t elements) {
    return kPacked ? (elements + 1) / 2 : kKind == Codes::f32 ? 4 * elements : kScaled ? elements : 2 * elements;
  }
  BK_INLINE void read(const Linear& a, const uint8_t* codes, float zero, float scale, vf* v) {
    if constexpr (kKind == Codes::f32) v[0] = load((const float*)codes);
    if constexpr (kKind == Codes::bf16) v[0] = load((const bf16*)codes);
    if constexpr (kKind == Codes::f16) v[0] = load((const f16*)codes);
    if constexpr (kKind == Codes::int8 || kKind == Codes::int8g) v[0] = load((const int8_t*)codes);
    if constexpr (kKind == Codes::fp8) v[0] = load_fp8(codes);
    if constexpr (kPacked) {
      vi both = widen_bytes(codes), high = (vi)((vu)both >> 4);
      if constexpr (kKind == Codes::book4) {
        v[0] = look_up(a.book, both), v[1] = look_up(a.book, high);
      } else if constexpr (kKind == Codes::affine4m) {
        v[0] = __builtin_convertvector(both & 15, vf) * scale + zero;
        v[1] = __builtin_convertvector(high, vf) * scale + zero;
      } else {
        v[0] = __builtin_convertvector(both & 15, vf) - zero, v[1] = __builtin_convertvector(high, vf) - zero;
      }
    }
  }
};

template <Codes kKind, int R, int T>
void floats_tile(const Linear& a, const float* x, int64_t n, int64_t token) {
  typedef Reader<kKind> Read;
  Tile<R, T> tile;
  x += token * whole(a.k);
  int64_t groups = a.group ? a.groups : 1, size = a.group ? a.group : a.k;
  for (int64_t g = 0; g < groups; ++g) {
    int64_t begin = g * size, end = begin + size < a.k ? begin + size : a.k, k = begin;
    float scale[R], zero[R] = {}, step[R] = {};
    for (int r = 0; r < R && Read::kScaled; ++r) {
      int64_t at = a.group ? (n + r) * a.groups + g : n + r;
      if (kKind == Codes::affine4) {
        scale[r] = load_one((const f16*)a.scale + at) * a.row_scale[n + r];
        zero[r] = load_one((const f16*)a.zero + at);
      } else if (kKind == Codes::affine4m) {
        scale[r] = 1, zero[r] = load_one((const f16*)a.zero + at), step[r] = load_one((const f16*)a.scale + at);
      } else if (kKind == Codes::int8g) {
        scale[r] = load_one((const f16*)a.scale + at);
      } else {
        scale[r] = ((const float*)a.scale)[at];
      }
    }
    vf acc[R][T] = {};
    auto advance = [&](auto code) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        vf v[Read::kVectors];
        Read::read(a, code(r), zero[r], step[r], v);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t)
          for (int i = 0; i < Read::kVectors; ++i) acc[r][t] += v[i] * load(x + t * whole(a.k) + k + i * W);
      }
    };
    for (; k + Read::kStep <= end; k += Read::kStep)
      advance([&](int r) __attribute__((always_inline)) { return a.codes + (n + r) * a.code_row + Read::bytes(k); });
    if (k < end) {  // the end of the row; x is zero beyond it
      uint8_t part[R][Read::bytes(Read::kStep)] = {};
      for (int r = 0; r < R; ++r)
        __builtin_memcpy(part[r], a.codes + (n + r) * a.code_row + Read::bytes(k), Read::bytes(end - k));
      advance([&](int r) __attribute__((always_inline)) { return part[r]; });
    }
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t)
        if constexpr (Read::kScaled) {
          tile.total[r][t] += acc[r][t] * scale[r];
        } else {
          tile.total[r][t] = acc[r][t];
        }
  }
  Tile<R, T>::put(a, tile, n, token);
}

// ---- pairs of bfloat16: as they are, or 4-bit codes of which one instruction looks up 32 ---------------------------

#if defined(__AVX512BF16__)

BK_INLINE bool by_pairs(const Linear& a) {
  return a.type == Type::bf16 && (a.kind == Codes::bf16 || ((a.kind == Codes::affine4 || a.kind == Codes::book4) &&
                                                            (a.group == 32 || a.group == 64 || a.group == 128)));
}

// Rows of bfloat16 with tokens of bfloat16: both are read where they are.
template <int R, int T>
void plain_tile(const Linear& a, int64_t n, int64_t token) {
  Tile<R, T> tile;
  const uint16_t* rows = (const uint16_t*)a.codes + n * (a.code_row / 2);
  const uint16_t* tokens = (const uint16_t*)a.in.data + token * a.in.stride;
  auto step = [&](int64_t k, auto get) __attribute__((always_inline)) {
    __m512bh x[T];
    for (int t = 0; t < T; ++t) x[t] = (__m512bh)get(tokens + t * a.in.stride + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      __m512bh w = (__m512bh)get(rows + r * (a.code_row / 2) + k);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) tile.total[r][t] = (vf)_mm512_dpbf16_ps((__m512)tile.total[r][t], w, x[t]);
    }
  };
  int64_t k = 0;
  for (; k + 32 <= a.k; k += 32) {
    for (int r = 0; r < R; ++r) prefetch(rows + (r + R) * (a.code_row / 2) + k);  // the next tile's rows
    step(k, [](const uint16_t* p) __attribute__((always_inline)) { return read<__m512i>(p); });
  }
  if (k < a.k) {
    __mmask32 some = ((__mmask32)1 << (a.k - k)) - 1;
    step(k, [some](const uint16_t* p) __attribute__((always_inline)) { return _mm512_maskz_loadu_epi16(some, p); });
  }
  Tile<R, T>::put(a, tile, n, token);
}

// Of each token: blocks of 128 elements, element 4 w + j at j * 32 + w, as the nibbles of 32 words give them; then the
// sums of the groups, by which the zero points count.
struct PairTokens {
  const uint16_t* x;
  const float* sums;
  int64_t row, groups;

  PairTokens(const Linear& a, const void* ready) {
    row = whole(a.k), groups = (a.groups + 15) / 16 * 16;
    x = (const uint16_t*)ready;
    sums = (const float*)(x + a.m * row);
  }
};

void pair_tokens(const Linear& a, void* ready) {
  PairTokens p(a, ready);
  uint16_t* to = (uint16_t*)p.x;
  float* sums = (float*)p.sums;
  __builtin_memset(sums, 0, a.m * p.groups * sizeof(float));
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  for (int64_t m = 0; m < a.m; ++m, to += p.row, sums += p.groups) {
    const uint16_t* x = (const uint16_t*)a.in.data + m * a.in.stride;
    for (int64_t k = 0; k < a.k; k += kBlock) {
      __m512i quarter[4];
      for (int i = 0; i < 4; ++i) {
        int64_t from = k + i * 32, left = a.k - from;
        __mmask32 mask = left >= 32 ? ~__mmask32{0} : left > 0 ? ((__mmask32)1 << left) - 1 : 0;
        quarter[i] = _mm512_maskz_loadu_epi16(mask, x + from);
        if (left > 0)
          sums[from / a.group] +=
              _mm512_reduce_add_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)quarter[i], ones));
      }
      for (int j = 0; j < 4; ++j)
        for (int i = 0; i < 4; ++i)
          write(to + k + j * 32 + i * 8, _mm512_cvtepi64_epi16(_mm512_srli_epi64(quarter[i], 16 * j)));
    }
  }
}

// The scales of the next kGroups groups, each in the lanes that its elements fall into: lane l of a sum is of elements
// 8 l to 8 l + 7 of a block.
template <bool kAffine, int kGroups>
BK_INLINE vf lane_scales(const void* scale, int64_t at) {
  __m128 few;
  if constexpr (kAffine) {
    int64_t bits = 0;
    __builtin_memcpy(&bits, (const uint16_t*)scale + at, kGroups * 2);
    few = _mm_cvtph_ps(_mm_cvtsi64_si128(bits));
  } else {
    const float* from = (const float*)scale + at;
    few = kGroups == 1   ? _mm_load_ss(from)
          : kGroups == 2 ? _mm_castsi128_ps(_mm_loadl_epi64((const __m128i*)from))
                         : _mm_loadu_ps(from);
  }
  if constexpr (kGroups == 1) return (vf)_mm512_broadcastss_ps(few);
  vi lanes;
  for (int i = 0; i < W; ++i) lanes[i] = i * kGroups / W;
  return (vf)_mm512_permutexvar_ps((__m512i)lanes, _mm512_castps128_ps512(few));
}

template <bool kAffine, int kGroups, int R, int T>
void pairs_tile(const Linear& a, const PairTokens& p, int64_t n, int64_t token) {
  Tile<R, T> tile;
  alignas(64) float values[16];
  for (int i = 0; i < 16; ++i) values[i] = kAffine ? (float)i : a.book[i];
  bf16 narrow[16];
  store(narrow, load(values));
  // Bit 4 of an index is a bit of the neighbouring code: the table holds its 16 values twice.
  const __m512i book = _mm512_broadcast_i64x4(read<__m256i>(narrow));
  const uint16_t* x = p.x + token * p.row;
  auto block = [&](int64_t k, int r, __m512i four, vf scale) __attribute__((always_inline)) {
    __m512i w[4] = {_mm512_permutexvar_epi16(four, book), _mm512_permutexvar_epi16(_mm512_srli_epi16(four, 4), book),
                    _mm512_permutexvar_epi16(_mm512_srli_epi16(four, 8), book),
                    _mm512_permutexvar_epi16(_mm512_srli_epi16(four, 12), book)};
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      vf acc{};
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        acc = (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w[j], (__m512bh)read<__m512i>(x + t * p.row + k + j * 32));
      tile.total[r][t] += acc * scale;
    }
  };
  int64_t k = 0, g = 0;
  for (; k + kBlock <= a.k; k += kBlock, g += kGroups) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint8_t* codes = a.codes + (n + r) * a.code_row + k / 2;
      prefetch(codes + R * a.code_row);  // the next tile's rows
      block(k, r, read<__m512i>(codes), lane_scales<kAffine, kGroups>(a.scale, (n + r) * a.groups + g));
    }
  }
  if (k < a.k)
    for (int r = 0; r < R; ++r) {
      uint8_t part[64] = {};
      __builtin_memcpy(part, a.codes + (n + r) * a.code_row + k / 2, (a.k - k + 1) / 2);
      uint32_t scales[4] = {};
      constexpr int64_t size = kAffine ? 2 : 4;
      __builtin_memcpy(scales, (const char*)a.scale + ((n + r) * a.groups + g) * size, (a.groups - g) * size);
      block(k, r, read<__m512i>(part), lane_scales<kAffine, kGroups>(scales, 0));
    }
  if (kAffine)
    for (int r = 0; r < R; ++r) {
      for (int64_t g = 0; g < a.groups; g += W) {
        __mmask16 some = a.groups - g >= W ? 0xffff : (__mmask16)((1u << (a.groups - g)) - 1);
        int64_t at = (n + r) * a.groups + g;
        vf zero = (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, a.zero + at)) *
                  (vf)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, (const uint16_t*)a.scale + at));
        for (int t = 0; t < T; ++t) tile.total[r][t] -= zero * load(p.sums + (token + t) * p.groups + g);
      }
      for (int t = 0; t < T; ++t) tile.total[r][t] *= a.row_scale[n + r];
    }
  Tile<R, T>::put(a, tile, n, token);
}
#else
BK_INLINE bool by_pairs(const Linear&) { return false; }
#endif

// ---- the step program's products, where they are the faster way ----------------------------------------------------

constexpr int32_t kPairs16 = 2;    // tokens of bfloat16, which stay what they are
constexpr int64_t kMostFew = 16;   // tokens
constexpr int64_t kColumns = 128;  // of the result that are made before they are written

// Codes of 4 bits: one token a third faster, 8 and 16 by 1.3 to 1.4; in between, tiles of rows and tokens are.
BK_INLINE bool by_product(const Linear& a) {
  return kHasPairs && a.type == Type::bf16 && packed(a) && (a.m == 1 || (a.m >= 8 && a.m <= kMostFew));
}

void product_tokens(const Linear& a, void* ready) {
  float* row = (float*)((char*)ready + product_ready(a, kPairs16, a.m));
  for (int64_t m = 0; m < a.m; ++m) {
    const bf16* x = (const bf16*)a.in.data + m * a.in.stride;
    int64_t k = 0;
    for (; k + W <= a.k; k += W) store(row + k, load(x + k));
    if (k < a.k) store(row + k, load(x + k, a.k - k), a.k - k);
    product_prepare(a, kPairs16, row, 0, a.m, m, m + 1, ready);
  }
}

// `count` columns of the result, from column n on.
template <class Y>
void write_columns(const Linear& a, const float* y, int64_t n, int64_t count) {
  for (int64_t m = 0; m < a.m; ++m, y += kColumns) {
    Y* out = (Y*)a.out + m * a.n + n;
    for (int64_t i = 0; i < count; i += W) {
      const int64_t left = count - i;
      vf v = load(y + i);
      if (a.bias) v += left >= W ? load(a.bias + n + i) : load(a.bias + n + i, left);
      left >= W ? store(out + i, v) : store(out + i, v, left);
    }
  }
}

void product_columns(const Linear& a, const void* ready, int64_t begin, int64_t end) {
  alignas(64) float y[kMostFew][kColumns];
  alignas(64) char workspace[kProductWorkspace];
  for (int64_t n = begin; n < end; n += kColumns) {
    int64_t count = end - n < kColumns ? end - n : kColumns;
    product(a, kPairs16, ready, a.m, n, n + count, y[0], kColumns, workspace);
    switch (a.out_type) {
      case Type::f32: write_columns<float>(a, y[0], n, count); break;
      case Type::bf16: write_columns<bf16>(a, y[0], n, count); break;
      case Type::f16: write_columns<f16>(a, y[0], n, count); break;
    }
  }
}

// ---- tiles of rows and tokens ---------------------------------------------------------------------------------------

template <int N>
struct Number {
  static constexpr int value = N;
};

// f(Number<R>, n, Number<T>, token) over rows [begin, end) of the weight and all tokens; rows stay in the cache
// meanwhile.
template <class F>
BK_INLINE void for_tiles(const Linear& a, int64_t begin, int64_t end, F f) {
  for (int64_t n = begin; n < end;) {
    auto tokens = [&](auto rows) __attribute__((always_inline)) {
      int64_t m = 0;
      for (; a.m - m >= kTokens; m += kTokens) f(rows, n, Number<kTokens>(), m);
      if (a.m - m >= 2) f(rows, n, Number<2>(), m), m += 2;
      if (a.m - m >= 1) f(rows, n, Number<1>(), m);
      n += decltype(rows)::value;
    };
    // One token by pairs is read a row after the other, which is how the memory is fastest.
    if (end - n >= kRows && !(a.m == 1 && by_pairs(a))) {
      tokens(Number<kRows>());
    } else {
      tokens(Number<1>());
    }
  }
}

template <Codes kKind>
void floats(const Linear& a, const void* ready, int64_t begin, int64_t end) {
  for_tiles(a, begin, end, [&](auto rows, int64_t n, auto tokens, int64_t token) __attribute__((always_inline)) {
    floats_tile<kKind, decltype(rows)::value, decltype(tokens)::value>(a, (const float*)ready, n, token);
  });
}

#if defined(__AVX512BF16__)
template <bool kAffine, int kGroups>
void pairs_of(const Linear& a, const void* ready, int64_t begin, int64_t end) {
  PairTokens p(a, ready);
  for_tiles(a, begin, end, [&](auto rows, int64_t n, auto tokens, int64_t token) __attribute__((always_inline)) {
    pairs_tile<kAffine, kGroups, decltype(rows)::value, decltype(tokens)::value>(a, p, n, token);
  });
}

template <bool kAffine>
void pairs(const Linear& a, const void* ready, int64_t begin, int64_t end) {
  switch (a.group) {
    case 32: return pairs_of<kAffine, 4>(a, ready, begin, end);
    case 64: return pairs_of<kAffine, 2>(a, ready, begin, end);
    default: return pairs_of<kAffine, 1>(a, ready, begin, end);
  }
}

void all_pairs(const Linear& a, const void* ready, int64_t begin, int64_t end) {
  if (a.kind == Codes::affine4) return pairs<true>(a, ready, begin, end);
  if (a.kind == Codes::book4) return pairs<false>(a, ready, begin, end);
  for_tiles(a, begin, end, [&](auto rows, int64_t n, auto tokens, int64_t token) __attribute__((always_inline)) {
    plain_tile<decltype(rows)::value, decltype(tokens)::value>(a, n, token);
  });
}
#endif

}  // namespace

int64_t linear_few_most(const Linear& a) {
#if defined(__AMX_BF16__)
  if (tiles::serves(a)) return tiles::kMost;
#endif
  return plain(a) || packed(a) ? 16 : 8;
}

int64_t linear_few_size(const Linear& a) {
#if defined(__AMX_BF16__)
  if (tiles::serves(a)) return tiles::ready_bytes(a);
#endif
  if (by_product(a)) return product_ready(a, kPairs16, a.m) + a.k * (int64_t)sizeof(float);
  return a.m * (whole(a.k) + (a.groups + 15) / 16 * 16) * (int64_t)sizeof(float);
}

void linear_few_prepare(const Linear& a, void* ready) {
#if defined(__AMX_BF16__)
  if (tiles::serves(a)) return tiles::prepare(a, (uint16_t*)ready);
#endif
  if (by_product(a)) return product_tokens(a, ready);
#if defined(__AVX512BF16__)
  if (by_pairs(a)) {
    if (packed(a)) pair_tokens(a, ready);
    return;
  }
#endif
  switch (a.type) {
    case Type::f32: return widen_tokens<float>(a, (float*)ready);
    case Type::bf16: return widen_tokens<bf16>(a, (float*)ready);
    case Type::f16: return widen_tokens<f16>(a, (float*)ready);
  }
}

void linear_few(const Linear& a, const void* ready, int64_t begin, int64_t end) {
#if defined(__AMX_BF16__)
  if (tiles::serves(a)) return tiles::run(a, (const uint16_t*)ready, begin, end);
#endif
  if (by_product(a)) return product_columns(a, ready, begin, end);
#if defined(__AVX512BF16__)
  if (by_pairs(a)) return all_pairs(a, ready, begin, end);
#endif
  switch (a.kind) {
    case Codes::f32: return floats<Codes::f32>(a, ready, begin, end);
    case Codes::bf16: return floats<Codes::bf16>(a, ready, begin, end);
    case Codes::f16: return floats<Codes::f16>(a, ready, begin, end);
    case Codes::int8: return floats<Codes::int8>(a, ready, begin, end);
    case Codes::fp8: return floats<Codes::fp8>(a, ready, begin, end);
    case Codes::affine4: return floats<Codes::affine4>(a, ready, begin, end);
    case Codes::book4: return floats<Codes::book4>(a, ready, begin, end);
    case Codes::affine4m: return floats<Codes::affine4m>(a, ready, begin, end);
    case Codes::int8g: return floats<Codes::int8g>(a, ready, begin, end);
  }
}

}  // namespace BK_ISA
}  // namespace bigkernels
