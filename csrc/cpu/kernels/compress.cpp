// Numbers in 8 bits with a scale a block, and back: 8-bit integers, or floats of 4 exponent and 3 mantissa bits.
#include "linear_codes.h"
#include "random.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

BK_INLINE vi ints(vf v) { return __builtin_convertvector(v, vi); }  // towards zero
BK_INLINE vf floats(vi v) { return __builtin_convertvector(v, vf); }

BK_INLINE vf unit(vu random) { return (vf)((random >> 9) | 0x3f800000u) - 1.0f; }  // in [0, 1)

// What codes say beside numbers (see bigkernels/ops/compress.py): a value that is not zero and smaller than what the
// codes can tell from it, infinity, and NaN.
constexpr int kInt8Tiny = 126, kInt8Infinite = 127, kInt8Nan = -128, kFp8Infinite = 0x7e, kFp8Nan = 0x7f;
constexpr float kTiny = 0x1p-8f;          // in steps
constexpr float kLeastScale = 0x1p-116f;  // what is scaled by it is a normal number in every type
constexpr int kExponent = 0x7f800000;

// y in [-125, 125] but for rounding; `bits` are those of the value itself, which is a number if kNumbers.
template <bool kStochastic, bool kNumbers>
BK_INLINE vi int8_codes(vf y, vu random, vi bits) {
  y = vmax(splat(-125.0f), vmin(splat(125.0f), y));
  const vf shifter = splat(0x1.8p23f);  // adding it rounds to an integer in the low bits, half to even
  // 16 random bits are what a sum of up to 256 holds; products are exact, so that it does not matter which are fused.
  vi codes =
      kStochastic ? ints(y + 128.0f + floats((vi)(random >> 16)) * 0x1p-16f) - 128 : (vi)(y + shifter) - (vi)shifter;
  vi magnitude = bits & 0x7fffffff, negative = bits >> 31;
  codes = (codes == 0) & (magnitude != 0) ? ((vi{} + kInt8Tiny) ^ negative) - negative : codes;
  if (kNumbers) return codes;
  codes = magnitude == kExponent ? ((vi{} + kInt8Infinite) ^ negative) - negative : codes;
  return magnitude > kExponent ? vi{} + kInt8Nan : codes;
}

// y in [-416, 416] but for rounding. Above 2^-6 the float's own bits are rounded and its exponent rebased; below, codes
// count units of 2^-9, the last of which is 2^-6 again.
template <bool kStochastic, bool kNumbers>
BK_INLINE vi fp8_codes(vf y, vu random, vi value) {
  vi sign = (value >> 24) & 0x80;
  vf magnitude = vmin(splat(416.0f), vabs(y));
  vu bits = (vu)magnitude;
  vu normal = (bits + (kStochastic ? random & 0xfffff : 0x7ffff + ((bits >> 20) & 1))) >> 20;
  const vf shifter = splat(0x1.8p23f);
  vi subnormal =
      kStochastic ? ints(magnitude * 512.0f + unit(random)) : (vi)(magnitude * 512.0f + shifter) - (vi)shifter;
  vi rebased = (vi)normal - (120 << 3);
  vi code = magnitude < splat(0x1p-6f) ? subnormal : rebased;
  vi size = value & 0x7fffffff;
  code = (code == 0) & (size != 0) ? vi{} + 1 : code;
  if (kNumbers) return sign | code;
  code = size == kExponent ? vi{} + kFp8Infinite : code;
  return sign | (size > kExponent ? vi{} + kFp8Nan : code);
}

BK_INLINE void store_codes(uint8_t* out, vi codes, int64_t n) {
  vb bytes = __builtin_convertvector(codes, vb);
  if (n >= W)
    write(out, bytes);
  else
    __builtin_memcpy(out, &bytes, n);
}

template <bool kFp8, bool kStochastic, bool kNumbers>
BK_INLINE void write_codes(const Compress& a, int64_t first, int64_t n, const vf* x, float inverse) {
  for (int v = 0; v * W < n; ++v) {
    vf y = x[v] * inverse;
    vu random = kStochastic ? random_words(a.key, first + v * W) : vu{};
    vi codes = kFp8 ? fp8_codes<kStochastic, kNumbers>(y, random, (vi)x[v])
                    : int8_codes<kStochastic, kNumbers>(y, random, (vi)x[v]);
    store_codes(a.codes + first + v * W, codes, n - v * W);
  }
}

template <class T, bool kFp8, bool kStochastic>
void encode(const Compress& a, int64_t begin, int64_t end) {
  constexpr float kTop = kFp8 ? 416.0f : 125.0f, kLeast = kTop * kLeastScale;
  constexpr float kMost = 0x1.fffffcp127f / kTop * (1 - 0x1p-22f);  // times the largest code, still a number
  for (int64_t b = begin; b < end; ++b) {
    int64_t first = b * kCompressBlock, n = a.n - first < kCompressBlock ? a.n - first : kCompressBlock;
    const T* from = (const T*)a.values + first;
    vf x[kCompressBlock / W];
    vi most = {};  // bits of magnitudes are ordered as magnitudes are, with infinity and NaN above all others
    for (int v = 0; v < kCompressBlock / W; ++v) {
      int64_t count = n - v * W;
      x[v] = count >= W ? load(from + v * W) : count > 0 ? load(from + v * W, count) : vf{};
      vi magnitude = (vi)x[v] & 0x7fffffff;
      most = magnitude > most ? magnitude : most;
    }
    float top = max((vf)(most > kExponent ? vi{} + kExponent : most));
    bool numbers = top != __builtin_inff();
    if (!numbers) {
      vf largest = {};
      for (vf v : x) largest = vmax((vf)((vi)vabs(v) & ((vi)vabs(v) < kExponent)), largest);
      top = max(largest);
    }
    top = top > kLeast ? top : kLeast;
    float scale = top / kTop, inverse = kTop / top;
    a.scale[b] = scale < kMost ? scale : kMost;
    if (numbers)
      write_codes<kFp8, kStochastic, true>(a, first, n, x, inverse);
    else
      write_codes<kFp8, kStochastic, false>(a, first, n, x, inverse);
  }
}

template <bool kFp8>
struct CodeOf {
  typedef int8_t type;
};
template <>
struct CodeOf<true> {
  typedef uint8_t type;
};
template <class T>
constexpr bool kIsF16 = false;
template <>
constexpr bool kIsF16<f16> = true;

// What the codes of a block say. Codes that are no multiples of the scale are told apart by their last three bits: tiny
// times what stands there is their value.
struct Numbers {
  vf scale;
#if defined(__AVX2__)
  vf special;
#else
  float special[8];
#endif

  Numbers(float s, float tiny) : scale(splat(s)) {
    constexpr float infinity = __builtin_inff();
    static_assert((kInt8Tiny & 7) == 6 && (kInt8Infinite & 7) == 7 && (kInt8Nan & 7) == 0, "places of the table");
    alignas(64) static const float table[16] = {
        __builtin_nanf(""), -infinity, -1, 0, 0, 0, 1, infinity,
        __builtin_nanf(""), -infinity, -1, 0, 0, 0, 1, infinity,
    };
#if defined(__AVX2__)
    special = read<vf>(table) * tiny;
#else
    for (int i = 0; i < 8; ++i) special[i] = table[i] * tiny;
#endif
  }

  inline __attribute__((always_inline)) vf operator()(const int8_t* p) const {
#if defined(__AVX512F__)
    __m128i codes = _mm_loadu_si128((const __m128i*)p);
    __m512i code = _mm512_cvtepi8_epi32(codes);
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(code), (__m512)scale);
    __mmask16 is_special = _mm_cmpgt_epu8_mask(_mm_abs_epi8(codes), _mm_set1_epi8(kInt8Tiny - 1));
    return (vf)_mm512_mask_permutexvar_ps(value, is_special, code, (__m512)special);
#elif defined(__AVX2__)
    __m256i code = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
    __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(code), (__m256)scale);
    __m256i is_special = _mm256_cmpgt_epi32(_mm256_abs_epi32(code), _mm256_set1_epi32(kInt8Tiny - 1));
    __m256 other = _mm256_permutevar8x32_ps((__m256)special, code);
    return (vf)_mm256_blendv_ps(value, other, _mm256_castsi256_ps(is_special));
#else
    vf code = load(p), other;
    for (int i = 0; i < W; ++i) other[i] = special[p[i] & 7];
    return select_less(splat(kInt8Tiny - 1), vabs(code), other, code * scale);
#endif
  }
  inline __attribute__((always_inline)) vf operator()(const uint8_t* p) const {
    vf code = load_fp8(p);
#if defined(__AVX512F__)
    // Infinity is rare enough to be asked for.
    __mmask16 infinite = _mm512_cmp_ps_mask((__m512)vabs(code), _mm512_set1_ps(416.0f), _CMP_GT_OQ);
    if (__builtin_expect(infinite, 0))
      code = (vf)_mm512_mask_mul_ps((__m512)code, infinite, (__m512)code, _mm512_set1_ps(__builtin_inff()));
    return code * scale;
#else
    return (vabs(code) > splat(416.0f) ? code * __builtin_inff() : code) * scale;
#endif
  }
};

template <class T, bool kFp8>
void decode(const Compress& a, int64_t begin, int64_t end) {
  using Code = typename CodeOf<kFp8>::type;
  // The smallest number of a type that is not zero.
  constexpr float kSmallest = kIsF16<T> ? 0x1p-24f : 0.0f;
  for (int64_t b = begin; b < end; ++b) {
    int64_t first = b * kCompressBlock, n = a.n - first < kCompressBlock ? a.n - first : kCompressBlock;
    const Code* from = (const Code*)a.codes + first;
    T* to = (T*)a.values + first;
    float scale = a.scale[b], tiny = scale * kTiny < kSmallest ? kSmallest : scale * kTiny;
    Numbers value(scale, tiny);
    int64_t i = 0;
    if (a.stream)
      for (; i + 2 * W <= n; i += 2 * W) stream2(to + i, value(from + i), value(from + i + W));
    for (; i + W <= n; i += W) store(to + i, value(from + i));
    if (i < n) {
      Code rest[W] = {};
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
  by_type(a.type, [&](auto t) { encode<decltype(t)>(a, begin, end); });
}

void decompress(const Compress& a, int64_t begin, int64_t end) {
  by_type(a.type, [&](auto t) { decode<decltype(t)>(a, begin, end); });
}

}  // namespace BK_ISA
}  // namespace bigkernels
