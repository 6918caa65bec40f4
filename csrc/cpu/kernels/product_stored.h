// Panels of a weight that are made once and kept: what a product of any number of tokens reads, in one stream.
//
// A panel is 16 rows (zeros where the weight has none), for each group of the weight in turn:
//   its codes, in lines of 64 bytes that have 4 bytes of each row, as they are stored: 8 codes of 4 bits or 4 of 8; 32
//   codes of a row are 4 or 8 lines, and the last group has as many as it takes, in whole blocks of 32;
//   its scales of the 16 rows: float16 scale, then float16 zero (affine4, affine4m: 64 bytes); float16 scale (int8g: 32
//   bytes); float32 scale (book4: 64 bytes).
// After the groups come 16 float32 where rows have a scale (affine4: row_scale; int8, whose codes are one group:
// scale). The layout is the same at every level. Panel i, rows [16 i, 16 i + 16), lies at w.panels + i * w.panel_step.
//
// A token's result does not depend on how many of the others there are, nor on where a call's rows begin.
#pragma once
#include "product_panel.h"

namespace bigkernels {
namespace BK_ISA {

// Of blocks of GGUF files: program_blocks.cpp, program_blocks_exact.cpp.
int64_t block_panel_bytes(const Weight& w);
void make_block_panel(const Weight& w, int64_t n, uint8_t* panel);
void integers_from_block_panels(const Weight&, int32_t integers, const void* ready, int64_t m, int64_t begin,
                                int64_t end, float* out, int64_t stride);
void floats_from_block_panels(const Weight&, int32_t integers, const void* ready, int64_t m, int64_t begin, int64_t end,
                              float* out, int64_t stride);
void few_blocks(const Weight&, int32_t integers, const void* ready, int64_t m, int64_t begin, int64_t end, float* out,
                int64_t stride);

namespace {

// Bytes ahead that are asked for where there is enough to do between two lines: past a panel's end, into whatever comes
// after it in the program. Into the first level: Zen 4 gives half as much where it is asked for the second. One or two
// tokens wait for memory, and the processor's own prefetcher alone is then a fifth faster.
constexpr int64_t kAheadOfStream = 2048;
template <Codes kKind, int T>
constexpr bool asks_ahead() {
  return T > (kKind == Codes::int8 ? 4 : 2);
}

template <Codes kKind>
struct Stored {
  static constexpr bool kPacked = is_packed(kKind);
  static constexpr int64_t kLines = kPacked ? 4 : 8;  // of a block of 32
  static constexpr int64_t kScales = kKind == Codes::int8 ? 0 : kKind == Codes::int8g ? 32 : 64;
  static constexpr int64_t kRowScales = kKind == Codes::affine4 || kKind == Codes::int8 ? 64 : 0;
  static int64_t blocks(const Weight& w) { return (w.k + 31) / 32; }
  static int64_t bytes(const Weight& w) {
    return (blocks(w) * kLines * 64 + (kScales ? w.groups * kScales : 0) + kRowScales + 63) / 64 * 64;
  }
};

// ---- making them ----------------------------------------------------------------------------------------------------

template <Codes kKind>
void make_stored(const Weight& w, int64_t n, uint8_t* panel) {
  typedef Stored<kKind> S;
  const int64_t rows = w.n - n < kRows ? w.n - n : kRows, bytes = S::kPacked ? (w.k + 1) / 2 : w.k;
  const int64_t lines = S::blocks(w) * S::kLines, each = S::kScales ? w.group / 32 * S::kLines : lines;
  for (int64_t line = 0; line < lines; line += 16) {
    alignas(64) uint32_t transposed[16][kRows];
    const int64_t left = bytes - line * 4;
    if (rows == kRows && left >= 64) {
      transpose_lines(w.codes + n * w.code_row + line * 4, w.code_row, transposed, 64);
    } else {
      alignas(64) uint8_t part[kRows][64] = {};
      for (int64_t r = 0; r < rows; ++r)
        __builtin_memcpy(part[r], w.codes + (n + r) * w.code_row + line * 4, left < 64 ? left : 64);
      transpose_lines(part, 64, transposed, 64);
    }
    for (int64_t i = line; i < line + 16 && i < lines; ++i)
      __builtin_memcpy(panel + i * 64 + i / each * S::kScales, transposed[i - line], 64);
  }
  for (int64_t g = 0; S::kScales && g < w.groups; ++g) {
    const int64_t end = (g + 1) * each < lines ? (g + 1) * each : lines;
    uint8_t* to = panel + end * 64 + g * S::kScales;
    __builtin_memset(to, 0, S::kScales);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (n + r) * w.groups + g;
      if (kKind == Codes::book4) {
        ((float*)to)[r] = ((const float*)w.scale)[at];
      } else {
        ((uint16_t*)to)[r] = ((const uint16_t*)w.scale)[at];
        if (S::kPacked) ((uint16_t*)to)[kRows + r] = w.zero[at];
      }
    }
  }
  if (S::kRowScales) {
    float* to = (float*)(panel + lines * 64 + (S::kScales ? w.groups * S::kScales : 0));
    const float* from = kKind == Codes::affine4 ? w.row_scale : (const float*)w.scale;
    for (int64_t r = 0; r < kRows; ++r) to[r] = r < rows ? from[n + r] : 0;
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

// The products of a block of 32 codes. Where there is no vpdpbusd, codes of 4 bits are summed in 16 bits, eight times
// two products: 16 * 15 * 127 < 2^15.
#if !defined(BK_HAS_DPBUSD) && defined(__x86_64__)
template <bool kQuads>
struct BlockSum {
  vi sum;
  BK_INLINE void add(BlockSum& s, vu codes, const uint32_t* x) {
    if constexpr (!kQuads) {
      add_bytes<false>(s.sum, codes, x);
    } else {
      const vu tokens = vu{} + *x;
#if defined(__AVX2__)
      s.sum = (vi)_mm256_add_epi16((__m256i)s.sum, _mm256_maddubs_epi16((__m256i)codes, (__m256i)tokens));
#else
      s.sum = (vi)_mm_add_epi16((__m128i)s.sum, _mm_maddubs_epi16((__m128i)codes, (__m128i)tokens));
#endif
    }
  }
  BK_INLINE vf total(const BlockSum& s) {
    if constexpr (!kQuads) return to_floats(s.sum);
#if defined(__AVX2__)
    return to_floats((vi)_mm256_madd_epi16((__m256i)s.sum, _mm256_set1_epi16(1)));
#else
    return to_floats((vi)_mm_madd_epi16((__m128i)s.sum, _mm_set1_epi16(1)));
#endif
  }
};
#else
template <bool kQuads>
struct BlockSum {
  vi sum;
  BK_INLINE void add(BlockSum& s, vu codes, const uint32_t* x) { add_bytes<kQuads>(s.sum, codes, x); }
  BK_INLINE vf total(const BlockSum& s) { return to_floats(s.sum); }
};
#endif

template <Codes kKind, int T>
struct StoredIntegers {
  static void run(const Weight& w, const Tokens& a, const uint8_t* p, const char* block, Sixteen<T>& s) {
    typedef Stored<kKind> S;
    constexpr bool kQuads = S::kPacked, kGrouped = kKind != Codes::int8;
    constexpr int kParts = kQuads ? 2 : 1;
    const int64_t blocks = S::blocks(w), each = kGrouped ? w.group / 32 : blocks;
    const uint32_t* x = (const uint32_t*)block;
    const float *scales = a.scales(block), *sums = a.sums_of(block);
    for (int64_t b = 0; b < blocks; sums += T) {
      const int64_t end = b + each < blocks ? b + each : blocks;
      vf own[V], beside[V];
      const uint8_t* after = p + (end - b) * S::kLines * 64;
      for (int v = 0; v < V; ++v) {
        own[v] = beside[v] = splat(1);
        if constexpr (kGrouped) own[v] = load((const f16*)after + v * W);
        if constexpr (kQuads) beside[v] = load((const f16*)after + kRows + v * W);
        if constexpr (kKind == Codes::affine4) beside[v] = -(own[v] * beside[v]);
        if constexpr (kKind == Codes::int8g) beside[v] = own[v] * -(float)kOffset;
      }
      vf part[T][V];  // of the group
      for (int t = 0; t < T; ++t)
        for (int v = 0; v < V; ++v) part[t][v] = vf{};
      for (; b < end; ++b, p += S::kLines * 64, scales += T) {
        BlockSum<kQuads> sum[T][V];
        for (int t = 0; t < T; ++t)
          for (int v = 0; v < V; ++v) sum[t][v].sum = vi{};
#pragma GCC unroll 8
        for (int i = 0; i < S::kLines; ++i) {
          if (asks_ahead<kKind, T>()) __builtin_prefetch(p + 64 * i + kAheadOfStream);
          vu line[V];
          for (int v = 0; v < V; ++v) line[v] = read<vu>(p + 64 * i + v * W * 4);
#if defined(__AVX512F__)
          asm("" : "+v"(line[0]));  // gcc reads it twice, as an operand, and loads are the limit in the cache
#endif
#pragma GCC unroll 2
          for (int j = 0; j < kParts; ++j, x += T) {
            vu codes[V];
            for (int v = 0; v < V; ++v)
              codes[v] = kQuads    ? (j ? line[v] >> 4 : line[v]) & 0x0f0f0f0fu
                         : kOffset ? line[v] ^ 0x80808080u
                                   : line[v];
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t)
              for (int v = 0; v < V; ++v) BlockSum<kQuads>::add(sum[t][v], codes[v], x + t);
          }
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
          for (int v = 0; v < V; ++v)
            part[t][v] = multiply_add(BlockSum<kQuads>::total(sum[t][v]), splat(scales[t]), part[t][v]);
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t)
        for (int v = 0; v < V; ++v) s.acc[t][v] = kGrouped ? multiply_add(part[t][v], own[v], s.acc[t][v]) : part[t][v];
      p = after + S::kScales;
      if constexpr (kQuads || (kGrouped && kOffset != 0))
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
          for (int v = 0; v < V; ++v) s.acc[t][v] = multiply_add(beside[v], splat(sums[t]), s.acc[t][v]);
    }
    if constexpr (S::kRowScales != 0) {
      const float* total = a.sums_of(block);
      for (int v = 0; v < V; ++v) {
        const vf scale = load((const float*)p + v * W);
        for (int t = 0; t < T; ++t) {
          if (kKind == Codes::int8 && kOffset) s.acc[t][v] -= splat(kOffset * total[t]);
          s.acc[t][v] *= scale;
        }
      }
    }
  }
};

#if defined(__AVX512BF16__)
template <Codes kKind, int T>
struct StoredNibbles {
  static void run(const Weight& w, const Tokens& a, const uint8_t* p, const char* block, Sixteen<T>& s) {
    typedef Stored<kKind> S;
    const int64_t blocks = S::blocks(w), each = w.group / 32;
    const uint32_t* x = (const uint32_t*)block;
    const float* sums = a.sums_of(block);
    const __m512i table = code_table(w);
    for (int64_t b = 0; b < blocks; sums += T) {
      const int64_t end = b + each < blocks ? b + each : blocks;
      vf acc[2][T] = {};  // an addition takes six cycles
      for (; b < end; ++b)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i, p += 64) {
          __builtin_prefetch(p + kAheadOfStream);
          __m512i words[4];
          look_up_nibbles(read<__m512i>(p), table, words);
#pragma GCC unroll 4
          for (int c = 0; c < 4; ++c, x += T) {
            for (int t = 0; t < T; ++t) add_pair_of(acc[c % 2][t], words[c], x + t);
          }
        }
      const vf own = kKind == Codes::book4 ? load((const float*)p) : load((const f16*)p);
      vf beside{};
      if constexpr (kKind != Codes::book4) beside = load((const f16*)p + kRows);
      if constexpr (kKind == Codes::affine4) beside = -(own * beside);
      for (int t = 0; t < T; ++t) {
        s.acc[t][0] = multiply_add(acc[0][t] + acc[1][t], own, s.acc[t][0]);
        if (kKind != Codes::book4) s.acc[t][0] = multiply_add(beside, splat(sums[t]), s.acc[t][0]);
      }
      p += S::kScales;
    }
    if (kKind == Codes::affine4) {
      const vf scale = load((const float*)p);
      for (int t = 0; t < T; ++t) s.acc[t][0] *= scale;
    }
  }
};
#endif

template <class Kernel, int T>
void stored_panels(const Weight& w, const Tokens& a, const void* ready, int64_t begin, int64_t end, float* out,
                   int64_t stride) {
  for (int64_t n = begin / kRows * kRows; n < end; n += kRows)
    for (int64_t b = 0; b < a.blocks; ++b) {
      Sixteen<T> s;
      for (int t = 0; t < T; ++t)
        for (int v = 0; v < V; ++v) s.acc[t][v] = vf{};
      Kernel::run(w, a, w.panels + n / kRows * w.panel_step, a.block(ready, b), s);
      const int64_t first = n < begin ? begin : n, last = n + kRows < end ? n + kRows : end;
      const int64_t count = a.m - b * T < T ? a.m - b * T : T;
      for (int64_t t = 0; t < count; ++t) {
        float* to = out + (b * T + t) * stride - begin;
        if (last - first == kRows) {
          for (int v = 0; v < V; ++v) store(to + n + v * W, s.acc[t][v]);
        } else {
          alignas(64) float part[kRows];
          for (int v = 0; v < V; ++v) store(part + v * W, s.acc[t][v]);
          __builtin_memcpy(to + first, part + first - n, (last - first) * sizeof(float));
        }
      }
    }
}

#define BK_PANELS(kernel, kind) stored_panels<kernel<Codes::kind, T>, T>(w, a, ready, begin, end, out, stride)

template <int T>
void stored_product(const Weight& w, const Tokens& a, const void* ready, int64_t begin, int64_t end, float* out,
                    int64_t stride) {
#if defined(__AVX512BF16__)
  if (a.form == Form::nibbles) {
    if (w.kind == Codes::book4) return BK_PANELS(StoredNibbles, book4);
    return w.kind == Codes::affine4 ? BK_PANELS(StoredNibbles, affine4) : BK_PANELS(StoredNibbles, affine4m);
  }
#endif
  switch (w.kind) {
    case Codes::affine4: return BK_PANELS(StoredIntegers, affine4);
    case Codes::affine4m: return BK_PANELS(StoredIntegers, affine4m);
    case Codes::int8g: return BK_PANELS(StoredIntegers, int8g);
    default: return BK_PANELS(StoredIntegers, int8);
  }
}
#undef BK_PANELS

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
