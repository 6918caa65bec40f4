// Numbers in 8 bits with a scale a block, and back: 8-bit integers, or floats of 4 exponent and 3 mantissa bits.
#include "linear_codes.h"
#include "random.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

BK_INLINE vi ints(vf v) { return __builtin_convertvector(v, vi); }  // towards zero
BK_INLINE vf floats(vi v) { return __builtin_convertvector(v, vf); }

BK_INLINE vf unit(vu random) { return (vf)((random >> 9) | 0x3f800000u) - 1.0f; }  // in [0, 1)

// y in [-127, 127] but for rounding.
template <bool kStochastic>
BK_INLINE vi int8_codes(vf y, vu random) {
  y = vmax(splat(-127.0f), vmin(splat(127.0f), y));
  // 16 random bits are what a sum of up to 256 holds; products are exact, so that it does not matter which are fused.
  if (kStochastic) return ints(y + 128.0f + floats((vi)(random >> 16)) * 0x1p-16f) - 128;
  const vf shifter = splat(0x1.8p23f);  // adding it rounds to an integer in the low bits, half to even
  return (vi)(y + shifter) - (vi)shifter;
}

// y in [-448, 448] but for rounding. Above 2^-6 the float's own bits are rounded and its exponent rebased; below, codes
// count units of 2^-9, the last of which is 2^-6 again.
template <bool kStochastic>
BK_INLINE vi fp8_codes(vf y, vu random) {
  vi sign = ((vi)y >> 24) & 0x80;
  vf magnitude = vmin(splat(448.0f), vabs(y));
  vu bits = (vu)magnitude;
  vu normal = (bits + (kStochastic ? random & 0xfffff : 0x7ffff + ((bits >> 20) & 1))) >> 20;
  const vf shifter = splat(0x1.8p23f);
  vi subnormal =
      kStochastic ? ints(magnitude * 512.0f + unit(random)) : (vi)(magnitude * 512.0f + shifter) - (vi)shifter;
  vi rebased = (vi)normal - (120 << 3);
  vi code = (vi)select(magnitude < splat(0x1p-6f), (vf)subnormal, (vf)rebased);
  return sign | code;
}

BK_INLINE void store_codes(uint8_t* out, vi codes, int64_t n) {
  vb bytes = __builtin_convertvector(codes, vb);
  if (n >= W)
    write(out, bytes);
  else
    __builtin_memcpy(out, &bytes, n);
}

template <class T, bool kFp8, bool kStochastic>
void encode(const Compress& a, int64_t begin, int64_t end) {
  constexpr float kTop = kFp8 ? 448.0f : 127.0f;
  for (int64_t b = begin; b < end; ++b) {
    int64_t first = b * kCompressBlock, n = a.n - first < kCompressBlock ? a.n - first : kCompressBlock;
    const T* from = (const T*)a.values + first;
    vf x[kCompressBlock / W], largest = {};
    vi nan = {};
    for (int v = 0; v < kCompressBlock / W; ++v) {
      int64_t count = n - v * W;
      x[v] = count >= W ? load(from + v * W) : count > 0 ? load(from + v * W, count) : vf{};
      largest = vmax(vabs(x[v]), largest);
      nan |= x[v] != x[v];
    }
    float top = max(largest);
    for (int l = 0; l < W; ++l)
      if (nan[l]) top = __builtin_nanf("");
    // A block that is not finite becomes NaN: its scale says so.
    constexpr float kMost = 0x1.fffffcp127f / kTop * (1 - 0x1p-22f);  // times the largest code, still a number
    float scale = top - top == 0 ? (top / kTop < kMost ? top / kTop : kMost) : __builtin_nanf("");
    // The scale of a subnormal block may be no number to divide by.
    float inverse = top >= 0x1p-119f && scale == scale ? kTop / top : 0.0f;
    a.scale[b] = inverse != 0 || scale != scale ? scale : 0.0f;
    for (int v = 0; v * W < n; ++v) {
      vf y = x[v] * inverse;
      y = (vf)((vi)y & (y == y));  // infinity times zero is a code like any other
      vu random = kStochastic ? random_words(a.key, first + v * W) : vu{};
      store_codes(a.codes + first + v * W,
                  kFp8 ? fp8_codes<kStochastic>(y, random) : int8_codes<kStochastic>(y, random), n - v * W);
    }
  }
}

template <class T, bool kFp8>
void decode(const Compress& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    int64_t first = b * kCompressBlock, n = a.n - first < kCompressBlock ? a.n - first : kCompressBlock;
    const uint8_t* from = a.codes + first;
    T* to = (T*)a.values + first;
    vf scale = splat(a.scale[b]);
    auto value = [&](const uint8_t* p) { return (kFp8 ? load_fp8(p) : load((const int8_t*)p)) * scale; };
    int64_t i = 0;
    if (a.stream)
      for (; i + 2 * W <= n; i += 2 * W) stream2(to + i, value(from + i), value(from + i + W));
    for (; i + W <= n; i += W) store(to + i, value(from + i));
    if (i < n) {
      uint8_t rest[W] = {};
      __builtin_memcpy(rest, from + i, n - i);
      store(to + i, value(rest), n - i);
    }
  }
  if (a.stream) fence();
}

template <class T>
void encode(const Compress& a, int64_t begin, int64_t end) {
  if (a.fp8)
    a.stochastic ? encode<T, true, true>(a, begin, end) : encode<T, true, false>(a, begin, end);
  else
    a.stochastic ? encode<T, false, true>(a, begin, end) : encode<T, false, false>(a, begin, end);
}
template <class T>
void decode(const Compress& a, int64_t begin, int64_t end) {
  a.fp8 ? decode<T, true>(a, begin, end) : decode<T, false>(a, begin, end);
}

}  // namespace

void compress(const Compress& a, int64_t begin, int64_t end) {
  switch (a.type) {
    case Type::f32: return encode<float>(a, begin, end);
    case Type::bf16: return encode<bf16>(a, begin, end);
    case Type::f16: return encode<f16>(a, begin, end);
  }
}

void decompress(const Compress& a, int64_t begin, int64_t end) {
  switch (a.type) {
    case Type::f32: return decode<float>(a, begin, end);
    case Type::bf16: return decode<bf16>(a, begin, end);
    case Type::f16: return decode<f16>(a, begin, end);
  }
}

}  // namespace BK_ISA
}  // namespace bigkernels
