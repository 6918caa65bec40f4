// Products with blocks of GGUF files.
//
// As they are stored: blocks of some rows are decoded to float32, and multiplied with all tokens while they are in the
// first-level cache. In a step program from panels, tokens rounded to 8 bits. A panel is 16 rows, in chunks of kChunk
// elements (blocks, or pairs of those of 32 elements, the last with zeros where there is no second):
//   the scales of the 16 rows: of each group of 16 or 32 its integer scale (int8), then its integer minimum (Q2_K: both
//   in a byte), then those of blocks (float16), each 16 side by side; up to a multiple of 64 bytes;
//   for each 32 elements their codes, in lines of 64 bytes that have 4 bytes of each row: the plane of the lower 2 or 4
//   bits, in 2 or 4 lines, then that of the upper 1 or 2, as many lines. Elements [4 j, 4 j + 4) are a field of the
//   four bytes: field j % 4 of line j / 4 (2 bits), j % 2 of j / 2 (4 bits), bit j (1 bit).
// Where a kind has integer scales, they are kept: a panel takes hardly more than its blocks, but those of TQ1_0.
//
// A token's result does not depend on how many of the others there are, nor on where a call's rows begin.
#pragma once
#include "blocks.h"
#include "product_stored.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

// ---- panels ---------------------------------------------------------------------------------------------------------

// Codes with a sign, of a codebook, are multiplied with 128 added where there is vpdpbusd.
template <Codes kKind>
struct BlockPanel {
  static constexpr BlockShape s = shape_of<kKind>();
  static constexpr int64_t kSize = traits(kKind).block, kBytes = traits(kKind).block_bytes;
  static constexpr int64_t kChunk = kSize < 64 ? 64 : kSize, kBlocks = kChunk / kSize, kGroups = kChunk / s.group;
  static constexpr bool kShared = kKind == Codes::q2_k;  // a byte for scale and minimum of a group
  static constexpr int64_t kGroup = s.scaled ? (s.minimum && !kShared ? 32 : 16) : 0;  // bytes of a group of 16 rows
  static constexpr int64_t kOwn = (s.minimum ? 64 : 32) * kBlocks;                     // and of the blocks
  static constexpr int64_t kScales = (kGroups * kGroup + kOwn + 63) / 64 * 64;
  static constexpr int64_t kLow = s.low, kLines = s.low + s.high;  // of 32 elements
  static constexpr int64_t kStep = kScales + kChunk / 32 * kLines * 64;
  static constexpr int kLess = s.book ? kOffset : s.offset;  // what codes are too large by, as they are multiplied

  static int64_t bytes(const Weight& w) { return (w.k + kChunk - 1) / kChunk * kStep; }
};

// 16 bytes as floats.
template <bool kSigned>
BK_INLINE void load_bytes(const uint8_t* p, vf* to) {
  for (int v = 0; v < V; ++v) to[v] = kSigned ? load((const int8_t*)p + v * W) : codes_as_floats(p + v * W);
}

template <int kAdded>
BK_INLINE vu look_up_bytes(vu codes) {
  alignas(64) static constexpr auto book = [] {
    struct {
      uint8_t of[64];
    } x{};
    for (int i = 0; i < 64; ++i) x.of[i] = (uint8_t)(kIq4[i % 16] + kAdded);
    return x;
  }();
#if defined(__AVX512F__)
  return (vu)_mm512_shuffle_epi8(read<__m512i>(book.of), (__m512i)codes);
#elif defined(__AVX2__)
  return (vu)_mm256_shuffle_epi8(read<__m256i>(book.of), (__m256i)codes);
#elif defined(__SSSE3__)
  return (vu)_mm_shuffle_epi8(read<__m128i>(book.of), (__m128i)codes);
#else
  vq from = (vq)codes, to;
  for (int i = 0; i < 4 * W; ++i) to[i] = book.of[from[i]];
  return (vu)to;
#endif
}

// A chunk's scales, and each group's in turn.
template <Codes kKind>
struct ChunkScales {
  typedef BlockPanel<kKind> P;
  const uint8_t* at;
  vf d[V], m[V];

  BK_INLINE void block(ChunkScales& s, int64_t b) {
    const uint8_t* own = s.at + P::kGroups * P::kGroup + b * (P::s.minimum ? 64 : 32);
    for (int v = 0; v < V; ++v) {
      s.d[v] = load((const f16*)own + v * W);
      if constexpr (P::s.minimum) s.m[v] = load((const f16*)(own + 32) + v * W);
    }
  }
  // What is multiplied with a group's products, and with the sum of its tokens.
  BK_INLINE void group(const ChunkScales& s, int64_t g, vf* scale, vf* minimum) {
    const uint8_t* from = s.at + g * P::kGroup;
    if constexpr (!P::s.scaled) {
      for (int v = 0; v < V; ++v) scale[v] = s.d[v], minimum[v] = s.m[v];
    } else if constexpr (P::kShared) {
      for (int v = 0; v < V; ++v) {
        const vi both = widen_bytes(from + v * W);
        scale[v] = to_floats(both & 15) * s.d[v], minimum[v] = -(to_floats(both >> 4) * s.m[v]);
      }
    } else {
      load_bytes<!P::s.minimum>(from, scale);
      for (int v = 0; v < V; ++v) scale[v] *= s.d[v];
      if constexpr (P::s.minimum) {
        load_bytes<false>(from + kRows, minimum);
        for (int v = 0; v < V; ++v) minimum[v] = -(minimum[v] * s.m[v]);
      }
    }
  }
};

// Elements [4 j, 4 j + 4) of each row, as they are multiplied; those of a codebook with kAdded added.
template <Codes kKind, int kAdded>
BK_INLINE vu codes_of(const uint8_t* lines, int j, int v) {
  typedef BlockPanel<kKind> P;
  constexpr int kLowFields = 8 / P::s.low;
  vu low = read<vu>(lines + j / kLowFields * 64 + v * W * 4);
  const int shift = j % kLowFields * P::s.low;
  vu codes = (shift ? low >> shift : low) & (P::s.low == 4 ? 0x0f0f0f0fu : 0x03030303u);
  if constexpr (P::s.high > 0) {
    constexpr int kHighFields = 8 / P::s.high;
    constexpr uint32_t kMask = (P::s.high == 1 ? 0x01010101u : 0x03030303u) << P::s.low;
    const vu high = read<vu>(lines + (P::kLow + j / kHighFields) * 64 + v * W * 4);
    const int by = j % kHighFields * P::s.high - P::s.low;  // where its bits are, from where they belong
    codes |= (by > 0 ? high >> by : by < 0 ? high << -by : high) & kMask;
  }
  if constexpr (P::s.book) codes = look_up_bytes<kAdded>(codes);
  return codes;
}

template <template <Codes, int> class Kernel, int T>
void block_panels(const Weight& w, const Tokens& a, const void* ready, int64_t begin, int64_t end, float* out,
                  int64_t stride) {
  by_block_kind(w.kind, [&](auto kind) __attribute__((always_inline)) {
    stored_panels<Kernel<decltype(kind)::value, T>, T>(w, a, ready, begin, end, out, stride);
  });
}

// Numbers of tokens that a block has.
template <template <Codes, int> class Kernel>
void from_block_panels(const Weight& w, const Tokens& a, const void* ready, int64_t begin, int64_t end, float* out,
                       int64_t stride) {
  switch (a.count) {
    case 1: return block_panels<Kernel, 1>(w, a, ready, begin, end, out, stride);
    case 2: return block_panels<Kernel, 2>(w, a, ready, begin, end, out, stride);
#if defined(__AVX2__)
    case 4: return block_panels<Kernel, 4>(w, a, ready, begin, end, out, stride);
    case 6: return block_panels<Kernel, 6>(w, a, ready, begin, end, out, stride);
#endif
#if defined(__AVX512F__)
    case 8: return block_panels<Kernel, 8>(w, a, ready, begin, end, out, stride);
#endif
    default: return;
  }
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
