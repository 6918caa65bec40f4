// Products with blocks of GGUF files, tokens as they are: a few from the blocks as they are stored, any number from
// panels.
#include "product_blocks.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

// ---- as they are stored ---------------------------------------------------------------------------------------------

template <int R>
BK_INLINE void decoded_rows(const Weight& w, const Tokens& a, const void* ready, int64_t n, float* out,
                            int64_t stride) {
  constexpr int64_t kDepth = 256;
  constexpr int kAtOnce = 4;
  alignas(64) float part[R][kDepth];
  vf total[kTiled][R];
  for (int64_t m = 0; m < a.m; ++m)
    for (int r = 0; r < R; ++r) total[m][r] = vf{};
  for (int64_t k = 0; k < w.k; k += kDepth) {
    const int64_t count = w.k - k < kDepth ? w.k - k : kDepth;
    for (int r = 0; r < R; ++r) decode_blocks(w, n + r, k, count, part[r]);
    auto tokens = [&](auto some, int64_t m) __attribute__((always_inline)) {
      constexpr int T = decltype(some)::value;
      vf acc[T][R] = {};
      const float* x = (const float*)a.block(ready, m) + k;
      for (int64_t i = 0; i < count; i += W) {
        vf v[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) v[r] = load(part[r] + i);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const vf token = load(x + t * (a.bytes / 4) + i);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) acc[t][r] = multiply_add(v[r], token, acc[t][r]);
        }
      }
      for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r) total[m + t][r] += acc[t][r];
    };
    int64_t m = 0;
    for (; a.m - m >= kAtOnce; m += kAtOnce) tokens(Count<kAtOnce>(), m);
    for (; m < a.m; ++m) tokens(Count<1>(), m);
  }
  for (int64_t m = 0; m < a.m; ++m)
    for (int r = 0; r < R; ++r) out[m * stride + r] = sum(total[m][r]);
}

// Tokens in float32, as they are.
template <Codes kKind, int T>
struct BlockFloats {
  typedef BlockPanel<kKind> P;

  // Byte c of each row's four codes.
  BK_INLINE vf code(vu codes, int c) {
    if constexpr (P::s.book || P::s.offset > 0) return to_floats((vi)(codes << (24 - 8 * c)) >> 24);
    return to_floats((vi)(c == 3 ? codes >> 24 : codes >> (8 * c) & 0xffu));
  }

  static void run(const Weight& w, const Tokens&, const uint8_t* p, const char* block, Sixteen<T>& s) {
    constexpr int kParts = 32 / P::s.group, kFields = 8 / kParts;
    const float* x = (const float*)block;
    for (int64_t k = 0; k < w.k; k += P::kChunk, p += P::kStep) {
      ChunkScales<kKind> of;
      of.at = p;
      if constexpr (P::kBlocks == 1) ChunkScales<kKind>::block(of, 0);
      const uint8_t* lines = p + P::kScales;
      for (int64_t b = 0; b < P::kChunk / 32; ++b, lines += P::kLines * 64) {
        if constexpr (P::kBlocks > 1) ChunkScales<kKind>::block(of, b);
#pragma GCC unroll 2
        for (int g = 0; g < kParts; ++g) {
          vf scale[V], minimum[V], acc[T][V];
          ChunkScales<kKind>::group(of, b * kParts + g, scale, minimum);
          for (int t = 0; t < T; ++t)
            for (int v = 0; v < V; ++v) acc[t][v] = vf{};
#pragma GCC unroll 8
          for (int j = 0; j < kFields; ++j) {
            vu codes[V];
            for (int v = 0; v < V; ++v) {
              codes[v] = codes_of<kKind, 0>(lines, g * kFields + j, v);
              if constexpr (P::s.offset > 0) codes[v] = (vu)((vq)codes[v] - (uint8_t)P::s.offset);
            }
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c, x += T)
              for (int v = 0; v < V; ++v) {
                vf value = code(codes[v], c);
                if constexpr (P::s.minimum) value = multiply_add(value, scale[v], minimum[v]);
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) acc[t][v] = multiply_add(value, splat(x[t]), acc[t][v]);
              }
          }
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t)
            for (int v = 0; v < V; ++v)
              s.acc[t][v] = P::s.minimum ? s.acc[t][v] + acc[t][v] : multiply_add(acc[t][v], scale[v], s.acc[t][v]);
        }
      }
    }
  }
};

}  // namespace

// Of up to kTiled tokens.
void few_blocks(const Weight& w, int32_t integers, const void* ready, int64_t m, int64_t begin, int64_t end, float* out,
                int64_t stride) {
  const Tokens a(w, integers, m);
  int64_t n = begin;
  for (; end - n >= 4; n += 4) decoded_rows<4>(w, a, ready, n, out + n - begin, stride);
  for (; n < end; ++n) decoded_rows<1>(w, a, ready, n, out + n - begin, stride);
}

void floats_from_block_panels(const Weight& w, int32_t integers, const void* ready, int64_t m, int64_t begin,
                              int64_t end, float* out, int64_t stride) {
  from_block_panels<BlockFloats>(w, Tokens(w, integers, m), ready, begin, end, out, stride);
}

}  // namespace BK_ISA
}  // namespace bigkernels
