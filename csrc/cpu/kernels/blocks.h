// Blocks of GGUF files, as they lie in the file: codes and scales of consecutive elements of a row, in the order of
// ggml's structs (https://github.com/ggml-org/ggml, `ggml-common.h`). Taken apart here, and nowhere else: what reads
// them sees a code of 8 bits for each element, and for each group of 16 or 32 a scale and what is added after it.
#pragma once
#include <bigkernels/vec.h>

namespace bigkernels {
namespace BK_ISA {
namespace {

// What the codes of a kind are: element = scale * (code - kOffset) + minimum.
struct BlockShape {
  int low, high;  // bits of a code in the lower and in the upper plane of a panel
  int group;      // elements that share a scale: 16 or 32
  int offset;
  bool minimum;  // whether groups have one
  bool scaled;   // whether groups have an integer scale, which that of the block multiplies
  bool book;     // whether codes are numbers of kIq4
};

template <Codes kKind>
constexpr BlockShape shape_of() {
  switch (kKind) {
    case Codes::q5_0: return {4, 1, 32, 16, false, false, false};
    case Codes::q5_1: return {4, 1, 32, 0, true, false, false};
    case Codes::q2_k: return {2, 0, 16, 0, true, true, false};
    case Codes::q3_k: return {2, 1, 16, 4, false, true, false};
    case Codes::q4_k: return {4, 0, 32, 0, true, true, false};
    case Codes::q5_k: return {4, 1, 32, 0, true, true, false};
    case Codes::q6_k: return {4, 2, 16, 32, false, true, false};
    case Codes::iq4_nl: return {4, 0, 32, 0, false, false, true};
    case Codes::iq4_xs: return {4, 0, 32, 0, false, true, true};
    default: return {2, 0, 32, 1, false, false, false};  // tq1_0, tq2_0
  }
}

alignas(64) constexpr int8_t kIq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// f(KindOf<kind>()), whose `value` is the kind.
template <Codes kKind>
struct KindOf {
  static constexpr Codes value = kKind;
};
template <class F>
BK_INLINE auto by_block_kind(Codes kind, F f) {
  switch (kind) {
    case Codes::q5_0: return f(KindOf<Codes::q5_0>());
    case Codes::q5_1: return f(KindOf<Codes::q5_1>());
    case Codes::q2_k: return f(KindOf<Codes::q2_k>());
    case Codes::q3_k: return f(KindOf<Codes::q3_k>());
    case Codes::q4_k: return f(KindOf<Codes::q4_k>());
    case Codes::q5_k: return f(KindOf<Codes::q5_k>());
    case Codes::q6_k: return f(KindOf<Codes::q6_k>());
    case Codes::iq4_nl: return f(KindOf<Codes::iq4_nl>());
    case Codes::iq4_xs: return f(KindOf<Codes::iq4_xs>());
    case Codes::tq1_0: return f(KindOf<Codes::tq1_0>());
    default: return f(KindOf<Codes::tq2_0>());
  }
}

BK_INLINE BlockShape shape_of(Codes kind) {
  return by_block_kind(kind, [](auto of) { return shape_of<decltype(of)::value>(); });
}

// A block taken apart.
struct Parts {
  alignas(64) uint8_t code[256];
  int8_t scale[16], minimum[16];  // of groups, where they have them
  f16 d, m;                       // of the block: its scale, and that of its minima or its minimum
};

// ---- codes ----------------------------------------------------------------------------------------------------------

// Fields of kWidth bytes: those at the lowest bits first, then the next ones.
template <int kBits, int kWidth, int kFields>
BK_INLINE void fields(const uint8_t* from, uint8_t* to) {
  for (int f = 0; f < kFields; ++f)
    for (int i = 0; i < kWidth; ++i) to[f * kWidth + i] = from[i] >> (kBits * f) & ((1 << kBits) - 1);
}

// Bit i of 32 as bit kAt of byte i.
template <int kAt>
BK_INLINE void add_bits(const uint8_t* from, uint8_t* to) {
  for (int i = 0; i < 32; ++i) to[i] |= (from[i / 8] >> (i % 8) & 1) << kAt;
}

// Digits of base 3, five in a byte as a fraction of 256: a power of 3 takes the next digit to the front.
template <int kWidth, int kDigits>
BK_INLINE void digits(const uint8_t* from, uint8_t* to) {
  for (int d = 0, power = 1; d < kDigits; ++d, power *= 3)
    for (int i = 0; i < kWidth; ++i) to[d * kWidth + i] = (uint16_t)((uint8_t)(from[i] * power)) * 3 >> 8;
}

// Eight scales and eight minima of 6 bits in 12 bytes.
BK_INLINE void scales_of_6_bits(const uint8_t* from, Parts& p) {
  for (int i = 0; i < 4; ++i) {
    p.scale[i] = from[i] & 63, p.minimum[i] = from[4 + i] & 63;
    p.scale[4 + i] = (from[8 + i] & 15) | (from[i] >> 2 & 48);
    p.minimum[4 + i] = from[8 + i] >> 4 | (from[4 + i] >> 2 & 48);
  }
}

template <Codes kKind>
__attribute__((noinline)) void take_apart(const uint8_t* b, Parts& p) {
  uint8_t* to = p.code;
  auto half = [&](int at) __attribute__((always_inline)) { return read<f16>(b + at); };
  if constexpr (kKind == Codes::q5_0) {
    p.d = half(0);
    fields<4, 16, 2>(b + 6, to);
    add_bits<4>(b + 2, to);
  } else if constexpr (kKind == Codes::q5_1) {
    p.d = half(0), p.m = half(2);
    fields<4, 16, 2>(b + 8, to);
    add_bits<4>(b + 4, to);
  } else if constexpr (kKind == Codes::q2_k) {
    p.d = half(80), p.m = half(82);
    for (int i = 0; i < 16; ++i) p.scale[i] = b[i] & 15, p.minimum[i] = b[i] >> 4;
    for (int i = 0; i < 2; ++i) fields<2, 32, 4>(b + 16 + 32 * i, to + 128 * i);
  } else if constexpr (kKind == Codes::q3_k) {
    p.d = half(108);
    for (int i = 0; i < 16; ++i) {
      const int low = b[96 + i % 8] >> (i / 8 * 4) & 15, high = b[104 + i % 4] >> (i / 4 * 2) & 3;
      p.scale[i] = (int8_t)((low | high << 4) - 32);
    }
    for (int i = 0; i < 2; ++i) fields<2, 32, 4>(b + 32 + 32 * i, to + 128 * i);
    for (int j = 0; j < 8; ++j)
      for (int i = 0; i < 32; ++i) to[32 * j + i] |= (b[i] >> j & 1) << 2;
  } else if constexpr (kKind == Codes::q4_k || kKind == Codes::q5_k) {
    constexpr bool kFive = kKind == Codes::q5_k;
    p.d = half(0), p.m = half(2);
    scales_of_6_bits(b + 4, p);
    for (int i = 0; i < 4; ++i) fields<4, 32, 2>(b + (kFive ? 48 : 16) + 32 * i, to + 64 * i);
    for (int j = 0; kFive && j < 8; ++j)
      for (int i = 0; i < 32; ++i) to[32 * j + i] |= (b[16 + i] >> j & 1) << 4;
  } else if constexpr (kKind == Codes::q6_k) {
    p.d = half(208);
    __builtin_memcpy(p.scale, b + 192, 16);
    for (int i = 0; i < 2; ++i) {
      fields<4, 64, 2>(b + 64 * i, to + 128 * i);
      for (int f = 0; f < 4; ++f)
        for (int e = 0; e < 32; ++e) to[128 * i + 32 * f + e] |= (b[128 + 32 * i + e] >> (2 * f) & 3) << 4;
    }
  } else if constexpr (kKind == Codes::iq4_nl) {
    p.d = half(0);
    fields<4, 16, 2>(b + 2, to);
  } else if constexpr (kKind == Codes::iq4_xs) {
    p.d = half(0);
    for (int i = 0; i < 8; ++i) {
      const int low = b[4 + i / 2] >> (i % 2 * 4) & 15, high = b[2 + i / 4] >> (i % 4 * 2) & 3;
      p.scale[i] = (int8_t)((low | high << 4) - 32);
      fields<4, 16, 2>(b + 8 + 16 * i, to + 32 * i);
    }
  } else if constexpr (kKind == Codes::tq1_0) {
    p.d = half(52);
    digits<32, 5>(b, to);
    digits<16, 5>(b + 32, to + 160);
    digits<4, 4>(b + 48, to + 240);
  } else {
    p.d = half(64);
    for (int i = 0; i < 2; ++i) fields<2, 32, 4>(b + 32 * i, to + 128 * i);
  }
}

// ---- values ---------------------------------------------------------------------------------------------------------

BK_INLINE vf codes_as_floats(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  vi v;
  for (int i = 0; i < W; ++i) v[i] = p[i];
  return __builtin_convertvector(v, vf);
#endif
}

// Codes of a codebook as what they stand for, in place.
BK_INLINE void look_up_iq4(uint8_t* code, int64_t count) {
#if defined(__SSSE3__)
  const __m128i book = read<__m128i>(kIq4);
  for (int64_t i = 0; i < count; i += 16) write(code + i, _mm_shuffle_epi8(book, read<__m128i>(code + i)));
#else
  for (int64_t i = 0; i < count; ++i) code[i] = (uint8_t)kIq4[code[i]];
#endif
}

// A block of any kind: codes as they are multiplied with their group's scale.
struct Block {
  Parts p;
  float scale[16], minimum[16];
};

// Products with integer scales are exact, and so are theirs with codes where there is a minimum: values are the `gguf`
// package's bit for bit, however additions are fused.
__attribute__((noinline)) void read_block(Codes kind, const uint8_t* from, Block& b) {
  const BlockShape s = shape_of(kind);
  const int64_t size = traits(kind).block;
  by_block_kind(kind, [&](auto of) { take_apart<decltype(of)::value>(from, b.p); });
  if (s.book) look_up_iq4(b.p.code, size);
  for (int64_t i = 0; s.offset && i < size; ++i) b.p.code[i] -= (uint8_t)s.offset;
  const float d = load_one(&b.p.d), m = s.minimum ? load_one(&b.p.m) : 0.0f;
  for (int64_t g = 0; g < size / s.group; ++g) {
    b.scale[g] = s.scaled ? d * (float)b.p.scale[g] : d;
    b.minimum[g] = !s.minimum ? 0.0f : s.scaled ? -(m * (float)b.p.minimum[g]) : m;
  }
}

// Elements [k, k + span) of row n as T, multiples of 32; zeros from the row's end on.
template <class T>
__attribute__((noinline)) void decode_blocks(const Weight& a, int64_t n, int64_t k, int64_t span, T* to) {
  const CodesRow& row = traits(a.kind);
  const int64_t group = shape_of(a.kind).group, end = k + span < a.k ? k + span : a.k;
  const bool minimum = shape_of(a.kind).minimum;
  Block b;
  int64_t at = k;
  while (at < end) {
    const int64_t block = at / row.block, first = block * row.block;
    const int64_t last = first + row.block < end ? first + row.block : end;
    read_block(a.kind, a.codes + n * a.code_row + block * row.block_bytes, b);
    for (; at < last; at += group, to += group) {
      const vf scale = splat(b.scale[(at - first) / group]), more = splat(b.minimum[(at - first) / group]);
      for (int64_t i = 0; i < group; i += W) {
        const vf v = load((const int8_t*)b.p.code + at - first + i) * scale;
        store(to + i, minimum ? v + more : v);  // of a negative zero a sum makes another one
      }
    }
  }
  if (at < k + span) __builtin_memset(to, 0, (k + span - at) * sizeof(T));
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
