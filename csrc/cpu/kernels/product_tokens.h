// The tokens of a product as its kernels read them: rounded or not, and in the order in which codes come.
//
// A few tokens (most_few) are multiplied along the rows of a weight that is as stored: each token by itself, in the
// order of a vector of codes. More of them, or any number where the weight has panels, are multiplied with panels of 16
// rows, in blocks of up to kMost tokens: 32 bits of each token in turn, so that a token's are broadcast from a fixed
// place. A block is followed by the scales of its tokens (of 32 values each, where they are rounded to 8 bits) and by
// their sums over each group of the weight.
#pragma once
#include <bigkernels/program.h>

#include "gemm.h"
#include "linear_codes.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

// bytes: 8 bits; quads: 8 bits for codes of 4; pairs: bfloat16; nibbles: bfloat16 for codes of 4 bits; rounded: float32
// that are bfloat16.
enum class Form : int { floats, rounded, pairs, nibbles, bytes, quads };

constexpr int64_t kTiled = 16;  // tokens of float32 that are multiplied in tiles of rows and tokens
constexpr int64_t kMost = W == 16 ? 16 : W == 8 ? 6 : 2;
constexpr int64_t kMostByPanels = W == 16 ? 8 : kMost;  // with two sums each
constexpr int64_t kProductWorkspace = 144 << 10;        // bytes, at most
constexpr int64_t kPad = 512;                           // a few tokens' values are followed by zeros up to a multiple
constexpr int64_t kSpan = 128;  // values that are put into order at once, and the same of more tokens
#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

template <int N>
struct Count {
  static constexpr int value = N;
};

// The most tokens that are multiplied along rows.
BK_INLINE int64_t most_few(Form form, bool transposed) {
  switch (form) {
    case Form::floats:
    case Form::rounded: return transposed ? 3 : kTiled;
    case Form::pairs:
    case Form::nibbles: return transposed ? 0 : 4;
    default: return 3;
  }
}

BK_INLINE Form form_of(const Weight& w, int32_t integers, int64_t m) {
  if (is_blocks(w.kind)) return w.panels && integers == 1 ? Form::bytes : Form::floats;
  const Form rounded = kHasPairs ? Form::pairs : Form::rounded;
  switch (w.kind) {
    case Codes::f32:
    case Codes::f16: return Form::floats;
    case Codes::bf16: return integers < 0 ? Form::floats : m <= 3 && w.transposed ? Form::rounded : rounded;
    default: break;
  }
  if (integers <= 0) return Form::floats;
  switch (w.kind) {
    case Codes::affine4:
    case Codes::affine4m: return integers == 1 ? Form::quads : kHasPairs ? Form::nibbles : Form::rounded;
    case Codes::book4: return kHasPairs ? Form::nibbles : Form::rounded;
    case Codes::fp8: return rounded;
    default: return integers == 1 ? Form::bytes : m <= 2 ? Form::rounded : rounded;  // decoding takes the time of two
  }
}

struct Tokens {
  Form form;
  bool few, by_panels, by_columns;
  bool whole;                          // whether sums are of integers as they are, without the tokens' scales
  int64_t m, k, group, count, blocks;  // count: tokens of a block
  int64_t pick, width;                 // value i of run j of a stretch of codes is value i * pick + j; 1: as they come
  int64_t deep, sums, scale_at, sums_at, bytes;  // of a block

  Tokens(const Weight& w, int32_t integers, int64_t tokens) : m(tokens), k(w.k), group(w.group) {
    by_panels = w.panels;
    form = form_of(w, integers, m);
    int64_t groups = w.groups;
    whole = false;
    if (is_blocks(w.kind) && integer()) {
      const BlockShape shape = shape_of(w.kind);
      group = shape.group, groups = k / group, whole = !shape.minimum;
    }
    by_columns = w.transposed;
    few = !by_panels && m <= most_few(form, by_columns);
    const int64_t most = by_panels ? kMostByPanels : kMost;
    blocks = few ? m : (m + most - 1) / most;
    count = few || m <= 1 ? 1 : (m + blocks - 1) / blocks;
    if (!few && count > 1 && (!by_panels || is_blocks(w.kind))) count = (count + 1) / 2 * 2;
    pick = 1, width = 1;
    if (form == Form::quads) {
      pick = 2, width = few ? 4 * W : 4;
    } else if (form == Form::nibbles) {
      pick = 4, width = few ? 2 * W : 2;
    } else if (form == Form::pairs && w.kind != Codes::bf16 && !few) {
      pick = 2, width = 2;
    } else if (few && (form == Form::floats || form == Form::rounded) && packed(w)) {
      pick = 2, width = W;
    }
    const int64_t pad = few ? kPad : kSpan;
    deep = (k + pad - 1) / pad * pad;
    sums = group ? (groups + 15) / 16 * 16 : 16;
    scale_at = count * deep * size();
    sums_at = scale_at + (integer() ? count * deep / 32 * 4 : 0);
    bytes = sums_at + (integer() || form == Form::nibbles ? count * sums * 4 : 0);
  }
  bool integer() const { return form == Form::bytes || form == Form::quads; }
  int64_t size() const {
    switch (form) {
      case Form::bytes:
      case Form::quads: return 1;
      case Form::pairs:
      case Form::nibbles: return 2;
      default: return 4;
    }
  }
  // What a token is made into, as a number: equal for weights that may share it, whatever `few` is for them.
  int32_t number() const {
    return (int32_t)form | (int32_t)pick << 4 | (int32_t)by_panels << 7 |
           (int32_t)(sums_at < bytes ? group / 16 : 0) << 8 | (int32_t)by_columns << 12 | (int32_t)whole << 13;
  }

  const char* block(const void* ready, int64_t b) const { return (const char*)ready + b * bytes; }
  const float* scales(const char* block) const { return (const float*)(block + scale_at); }
  const float* sums_of(const char* block) const { return (const float*)(block + sums_at); }
};

// kSpan values to 8 bits, and their scales, one for 32 values: 0 where all are. Where a value is not finite, neither
// is the scale.
BK_INLINE void round_to_bytes(const float* x, int8_t* to, float* scale) {
  constexpr int kBlocks = kSpan / 32;
  int32_t top[kBlocks];  // of the bits of magnitudes, which are in their order, and those of NaN above all
  for (int b = 0; b < kBlocks; ++b) {
    vi most{};
    for (int i = 0; i < 32; i += W) {
      vi bits = (vi)load(x + 32 * b + i) & 0x7fffffff;
      most = bits > most ? bits : most;
    }
#if defined(__AVX512F__)
    top[b] = _mm512_reduce_max_epi32((__m512i)most);
#else
    top[b] = most[0];
    for (int i = 1; i < W; ++i) top[b] = most[i] > top[b] ? most[i] : top[b];
#endif
  }
  float factor[kBlocks];
  for (int b = 0; b < kBlocks; ++b) {
    float most;
    __builtin_memcpy(&most, &top[b], 4);
    factor[b] = 127.0f / most;
    scale[b] = most * (1.0f / 127.0f);
    if (most < 0x1p-100f) factor[b] = scale[b] = 0;
  }
  for (int i = 0; i < kSpan; i += W)
    store(to + i, vmin(vmax(load(x + i) * factor[i / 32], splat(-127.0f)), splat(127.0f)));
}

// Values from their order to that of codes: value i of run j of a stretch is value i * pick + j.
template <class E>
BK_INLINE void sort_span(const Tokens& a, const E* x, E* to) {
#if defined(__AVX512F__)
  if (sizeof(E) == 1) {
    for (int i = 0; i < 2; ++i) {
      __m512i v = read<__m512i>(x + 64 * i);
      if (a.few) {
        write(to + 32 * i, _mm512_cvtepi16_epi8(v));
        write(to + 64 + 32 * i, _mm512_cvtepi16_epi8(_mm512_srli_epi16(v, 8)));
      } else {
        const __m512i order =
            _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
        write(to + 64 * i, _mm512_shuffle_epi8(v, order));
      }
    }
    return;
  }
  if (sizeof(E) == 2) {
    for (int i = 0; i < 4; ++i) {
      __m512i v = read<__m512i>(x + 32 * i);
      if (a.few) {
        for (int j = 0; j < 4; ++j) write(to + j * 32 + i * 8, _mm512_cvtepi64_epi16(_mm512_srli_epi64(v, 16 * j)));
      } else {
        const __m128i by_four = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
        const __m128i by_two = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
        const __m512i order = _mm512_broadcast_i32x4(a.pick == 2 ? by_two : by_four);
        write(to + 32 * i, _mm512_shuffle_epi8(v, order));
      }
    }
    return;
  }
#endif
  if (sizeof(E) == 4) {  // even, then odd ones
    for (int c = 0; c < kSpan; c += 2 * W)
      for (int i = 0; i < W; ++i) to[c + i] = x[c + 2 * i], to[c + W + i] = x[c + 2 * i + 1];
    return;
  }
  for (int64_t c = 0; c < kSpan; c += a.pick * a.width)
    for (int64_t j = 0; j < a.pick; ++j)
      for (int64_t i = 0; i < a.width; ++i) to[c + j * a.width + i] = x[c + a.pick * i + j];
}

// The sums of a token's values over each group of the weight. Other threads may read what another has written here
// already: each place is written once.
struct GroupSums {
  float* to;
  int64_t step, group = 0;
  float sum = 0;

  // `count` values from k on, 32 or 16.
  BK_INLINE void add(GroupSums& s, const Tokens& a, int64_t k, float part, int64_t count = 32) {
    if (k >= a.k) return;
    s.sum += part;
    if (k + count < a.k && (!a.group || (k + count) % a.group)) return;
    s.to[s.group++ * s.step] = s.sum, s.sum = 0;
  }
  BK_INLINE void finish(GroupSums& s, const Tokens& a) {
    if (a.sums_at < a.bytes)
      for (; s.group < a.sums; ++s.group) s.to[s.group * s.step] = 0;
  }
};

// A span of a token's values, rounded and in the order of codes; its scales go to where they are read.
BK_INLINE void prepare_span(const Tokens& a, const float* x, int64_t k, uint32_t* words, float* scales,
                            GroupSums& sums) {
  alignas(64) float part[kSpan];
  const float* from = x + k;
  if (k + kSpan > a.k) {
    __builtin_memset(part, 0, sizeof part);
    if (k < a.k) __builtin_memcpy(part, from, (a.k - k) * sizeof(float));
    from = part;
  }
  if (a.integer()) {
    alignas(64) int8_t bytes[kSpan];
    int8_t* to = a.pick > 1 ? bytes : (int8_t*)words;
    float scale[kSpan / 32];
    round_to_bytes(from, to, scale);
    for (int64_t i = 0; i < kSpan; i += 32) {
      int total[2] = {};  // of 16 each
      for (int j = 0; j < 16; ++j) total[0] += to[i + j];
      for (int j = 0; j < 16; ++j) total[1] += to[i + 16 + j];
      const float by = a.whole ? 1.0f : scale[i / 32];
      scales[(k + i) / 32 * a.count] = scale[i / 32];
      if (a.group == 16) {
        for (int j = 0; j < 2; ++j) GroupSums::add(sums, a, k + i + 16 * j, (float)total[j] * by, 16);
      } else {
        GroupSums::add(sums, a, k + i, (float)(total[0] + total[1]) * by);
      }
    }
    if (a.pick > 1) sort_span(a, bytes, (int8_t*)words);
  } else if (a.form == Form::pairs || a.form == Form::nibbles) {
    alignas(64) bf16 pairs[kSpan];
    bf16* to = a.pick > 1 ? pairs : (bf16*)words;
    for (int64_t i = 0; i < kSpan; i += W) store(to + i, load(from + i));
    if (a.sums_at < a.bytes)
      for (int64_t i = 0; i < kSpan; i += 32) {
        vf total{};
        for (int64_t j = 0; j < 32; j += W) total += load(to + i + j);
        GroupSums::add(sums, a, k + i, BK_ISA::sum(total));
      }
    if (a.pick > 1) sort_span(a, pairs, (bf16*)words);
  } else {
    if (a.form == Form::rounded) {
      for (int64_t i = 0; i < kSpan; i += W) store(part + i, rounded<bf16>(load(from + i)));
      from = part;
    }
    if (a.pick > 1)
      sort_span(a, from, (float*)words);
    else
      __builtin_memcpy(words, from, kSpan * sizeof(float));
  }
}

BK_INLINE void prepare_token(const Tokens& a, const float* x, int64_t token, void* ready) {
  const int64_t lane = token % a.count, words = kSpan * a.size() / 4;
  char* block = (char*)ready + token / a.count * a.bytes;
  float* scales = (float*)(block + a.scale_at) + lane;
  GroupSums sums{(float*)(block + a.sums_at) + lane, a.count};
  uint32_t* to = (uint32_t*)block + lane;
  for (int64_t k = 0; k < a.deep; k += kSpan, to += words * a.count) {
    alignas(64) uint32_t span[kSpan];
    prepare_span(a, x, k, span, scales, sums);
    if (a.count == 1)
      __builtin_memcpy(to, span, words * 4);
    else
      for (int64_t i = 0; i < words; ++i) to[i * a.count] = span[i];
  }
  GroupSums::finish(sums, a);
}

#if defined(__AVX2__)
// Columns of 8 rows of 32-bit lanes, `from_bytes` apart, as rows.
BK_INLINE void transpose8(const char* from, int64_t from_bytes, char* to, int64_t to_bytes) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = read<__m256>(from + i * from_bytes);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      __m256d x = _mm256_castps_pd(b[i + j]), y = _mm256_castps_pd(b[i + 2 + j]);
      a[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(x, y));
      a[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    write(to + i * to_bytes, _mm256_permute2f128_ps(a[i], a[4 + i], 0x20));
    write(to + (4 + i) * to_bytes, _mm256_permute2f128_ps(a[i], a[4 + i], 0x31));
  }
}
#endif

// A whole block of 8 or 16 tokens, `stride` apart: their words change places by shuffles.
#if defined(__AVX512F__)
template <int kTokens>
BK_INLINE void prepare_block(const Tokens& a, const float* x, int64_t stride, int64_t token, void* ready) {
  const int64_t words = kSpan * a.size() / 4;
  char* block = (char*)ready + token / kTokens * a.bytes;
  float* scales = (float*)(block + a.scale_at);
  GroupSums sums[kTokens];
  for (int t = 0; t < kTokens; ++t) sums[t] = {(float*)(block + a.sums_at) + t, kTokens};
  char* to = block;
  for (int64_t k = 0; k < a.deep; k += kSpan, to += words * 4 * kTokens) {
    alignas(64) uint32_t span[kTokens][kSpan];
    for (int t = 0; t < kTokens; ++t) prepare_span(a, x + t * stride, k, span[t], scales + t, sums[t]);
    for (int64_t i = 0; i < words; i += kTokens) {
      const char* from = (const char*)(span[0] + i);
      if (kTokens == 16)
        transpose16(from, sizeof span[0], to + i * 4 * kTokens, 64);
      else
        transpose8(from, sizeof span[0], to + i * 4 * kTokens, 32);
    }
  }
  for (GroupSums& s : sums) GroupSums::finish(s, a);
}
#endif

BK_INLINE void prepare_tokens(const Tokens& a, const float* x, int64_t stride, int64_t begin, int64_t end,
                              void* ready) {
  for (int64_t t = begin; t < end; ++t) {
#if defined(__AVX512F__)
    if ((a.count == 16 || a.count == 8) && t % a.count == 0 && t + a.count <= end) {
      const float* from = x + t * stride;
      a.count == 16 ? prepare_block<16>(a, from, stride, t, ready) : prepare_block<8>(a, from, stride, t, ready);
      t += a.count - 1;
      continue;
    }
#endif
    prepare_token(a, x + t * stride, t, ready);
  }
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
