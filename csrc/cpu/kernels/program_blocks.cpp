// Blocks of GGUF files in step programs: panels of them, and products with tokens rounded to 8 bits.
#include "product_blocks.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

// The codes of 32 elements of one row into lines, 4 bytes in each.
template <Codes kKind>
BK_INLINE void put_codes(const uint8_t* code, uint8_t* lines) {
  typedef BlockPanel<kKind> P;
  constexpr int kFields = 8 / P::s.low;  // of a byte
  for (int line = 0; line < P::kLines; ++line)
    for (int i = 0; i < 4; ++i) {
      int bits = 0;
      if (line < P::kLow) {
        for (int f = 0; f < kFields; ++f)
          bits |= (code[4 * (line * kFields + f) + i] & ((1 << P::s.low) - 1)) << (P::s.low * f);
      } else if constexpr (P::s.high > 0) {
        constexpr int kHigh = 8 / P::s.high;
        for (int f = 0; f < kHigh; ++f)
          bits |= (code[4 * ((line - P::kLow) * kHigh + f) + i] >> P::s.low) << (P::s.high * f);
      }
      lines[line * 64 + i] = (uint8_t)bits;
    }
}

template <Codes kKind>
void make_block_panel(const Weight& w, int64_t n, uint8_t* panel) {
  typedef BlockPanel<kKind> P;
  const int64_t rows = w.n - n < kRows ? w.n - n : kRows, blocks = w.k / P::kSize;
  Parts p;
  __builtin_memset(panel, 0, P::bytes(w));
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* row = w.codes + (n + r) * w.code_row;
    for (int64_t b = 0; b < blocks; ++b) {
      take_apart<kKind>(row + b * P::kBytes, p);
      uint8_t* chunk = panel + b / P::kBlocks * P::kStep;
      const int64_t inside = b % P::kBlocks;
      for (int64_t g = 0; P::kGroup && g < P::kGroups; ++g) {
        uint8_t* to = chunk + g * P::kGroup;
        to[r] = (uint8_t)p.scale[g];
        if constexpr (P::kShared)
          to[r] |= (uint8_t)(p.minimum[g] << 4);
        else if constexpr (P::s.minimum)
          to[kRows + r] = (uint8_t)p.minimum[g];
      }
      uint8_t* own = chunk + P::kGroups * P::kGroup + inside * (P::s.minimum ? 64 : 32);
      write(own + 2 * r, p.d);
      if (P::s.minimum) write(own + 32 + 2 * r, p.m);
      uint8_t* lines = chunk + P::kScales + inside * (P::kSize / 32) * P::kLines * 64;
      for (int64_t k = 0; k < P::kSize; k += 32, lines += P::kLines * 64) put_codes<kKind>(p.code + k, lines + 4 * r);
    }
  }
}

template <Codes kKind, int T>
struct BlockIntegers {
  typedef BlockPanel<kKind> P;

  static void run(const Weight& w, const Tokens& a, const uint8_t* p, const char* block, Sixteen<T>& s) {
    constexpr int kParts = 32 / P::s.group, kFields = 8 / kParts;  // groups of 32 elements, and fields of each
    const uint32_t* x = (const uint32_t*)block;
    const float *scales = a.scales(block), *sums = a.sums_of(block);
    for (int64_t k = 0; k < w.k; k += P::kChunk, p += P::kStep) {
      ChunkScales<kKind> of;
      of.at = p;
      if constexpr (P::kBlocks == 1) ChunkScales<kKind>::block(of, 0);
      const uint8_t* lines = p + P::kScales;
      for (int64_t b = 0; b < P::kChunk / 32; ++b, lines += P::kLines * 64, scales += T) {
        if constexpr (P::kBlocks > 1) ChunkScales<kKind>::block(of, b);
        if (T > 2)
#pragma GCC unroll 8
          for (int i = 0; i < P::kLines; ++i) __builtin_prefetch(lines + 64 * i + kAheadOfStream);
        vf part[T][V];  // of 32 elements
#pragma GCC unroll 2
        for (int g = 0; g < kParts; ++g, sums += T) {
          vf scale[V], minimum[V];
          ChunkScales<kKind>::group(of, b * kParts + g, scale, minimum);
          vi sum[T][V];
          for (int t = 0; t < T; ++t)
            for (int v = 0; v < V; ++v) sum[t][v] = vi{};
#pragma GCC unroll 8
          for (int j = 0; j < kFields; ++j, x += T) {
            vu codes[V];
            for (int v = 0; v < V; ++v) codes[v] = codes_of<kKind, kOffset>(lines, g * kFields + j, v);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t)
              for (int v = 0; v < V; ++v) add_bytes<!P::s.book>(sum[t][v], codes[v], x + t);
          }
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t)
            for (int v = 0; v < V; ++v) {
              vf y = to_floats(sum[t][v]);
              if constexpr (P::kLess != 0) y = multiply_add(splat(sums[t]), splat(-(float)P::kLess), y);
              part[t][v] = g ? multiply_add(y, scale[v], part[t][v]) : y * scale[v];
              if constexpr (P::s.minimum) s.acc[t][v] = multiply_add(minimum[v], splat(sums[t]), s.acc[t][v]);
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
          for (int v = 0; v < V; ++v) s.acc[t][v] = multiply_add(part[t][v], splat(scales[t]), s.acc[t][v]);
      }
    }
  }
};

}  // namespace

int64_t block_panel_bytes(const Weight& w) {
  return by_block_kind(w.kind, [&](auto kind) { return BlockPanel<decltype(kind)::value>::bytes(w); });
}
void make_block_panel(const Weight& w, int64_t n, uint8_t* panel) {
  by_block_kind(w.kind, [&](auto kind) { make_block_panel<decltype(kind)::value>(w, n, panel); });
}

void integers_from_block_panels(const Weight& w, int32_t integers, const void* ready, int64_t m, int64_t begin,
                                int64_t end, float* out, int64_t stride) {
  from_block_panels<BlockIntegers>(w, Tokens(w, integers, m), ready, begin, end, out, stride);
}

}  // namespace BK_ISA
}  // namespace bigkernels
