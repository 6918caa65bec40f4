// One vector of float32 at the level being compiled, with loads and stores that convert from and to the storage types.
//
// Everything has internal linkage (see table.h). Arithmetic is the compiler's vector extension; intrinsics stand only
// where it has no word for the instruction.
#pragma once
#include <stdint.h>

#include "table.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define BK_INLINE static inline __attribute__((always_inline, unused))

namespace bigkernels {
namespace BK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef int8_t vb __attribute__((vector_size(W)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// run(float()), run(bf16()) or run(f16()): what is to be done with values of `type`, whose C++ type is decltype of the
// argument.
template <class Run>
BK_INLINE auto by_type(Type type, Run run) {
  switch (type) {
    case Type::f32: return run(float());
    case Type::bf16: return run(bf16());
    case Type::f16: return run(f16());
  }
  __builtin_unreachable();
}

template <class V>
BK_INLINE V read(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
BK_INLINE void write(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Not vf{} + v, which is an addition: it makes +0 of -0.
#if defined(__AVX512F__)
BK_INLINE vf splat(float v) { return (vf)_mm512_set1_ps(v); }
#elif defined(__AVX2__)
BK_INLINE vf splat(float v) { return (vf)_mm256_set1_ps(v); }
#else
BK_INLINE vf splat(float v) { return vf{v, v, v, v}; }
#endif
BK_INLINE vf select(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
// a < b ? x : y, lane by lane.
BK_INLINE vf select_less(vf a, vf b, vf x, vf y) {
#if defined(__AVX512F__)
  __mmask16 less = _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
  return (vf)_mm512_mask_blend_ps(less, (__m512)y, (__m512)x);
#else
  return select(a < b, x, y);
#endif
}
// 1 / x for x in [1, 2^100]: within an ulp, and faster than a division where there is an estimate to start from.
BK_INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
  vf r = (vf)_mm512_rcp14_ps((__m512)x);
  return r + r * (1.0f - x * r);
#else
  return 1.0f / x;
#endif
}
BK_INLINE vf vabs(vf x) { return (vf)((vi)x & 0x7fffffff); }
#if defined(__AVX512F__)
BK_INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
BK_INLINE vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
BK_INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
BK_INLINE vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
// b where either is NaN, as the instructions do.
BK_INLINE vf vmax(vf a, vf b) { return select(a > b, a, b); }
BK_INLINE vf vmin(vf a, vf b) { return select(a < b, a, b); }
#endif

// Sum and maximum of the lanes; NaN may get lost in the maximum.
#if defined(__AVX512F__)
BK_INLINE float sum(vf v) { return _mm512_reduce_add_ps((__m512)v); }
BK_INLINE float max(vf v) { return _mm512_reduce_max_ps((__m512)v); }
#else
BK_INLINE float sum(vf v) {
  float s[W];
  write(s, v);
  for (int n = W / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) s[i] += s[i + n];
  return s[0];
}
BK_INLINE float max(vf v) {
  float m = v[0];
  for (int i = 1; i < W; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
#endif

// ---- storage types --------------------------------------------------------------------------------------------------

BK_INLINE vf widen(vf v, const float*) { return v; }

BK_INLINE vf widen(vh h, const bf16*) {
#if defined(__AVX512F__)  // gcc 12 converts in two halves, five instructions instead of one
  return (vf)((vu)_mm512_cvtepu16_epi32((__m256i)h) << 16);
#elif defined(__AVX2__)
  return (vf)((vu)_mm256_cvtepu16_epi32((__m128i)h) << 16);
#else
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

#if defined(__F16C__)
BK_INLINE vf widen(vh h, const f16*) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)h);
#else
  return (vf)_mm256_cvtph_ps((__m128i)h);
#endif
}
#else
BK_INLINE vf widen(vh h, const f16*) {
  // The exponent is rebased by a multiplication, which also normalises the subnormal numbers.
  vu u = __builtin_convertvector(h, vu), magnitude = u & 0x7fff;
  vf value = (vf)(magnitude << 13) * 0x1p112f;
  vu inf_or_nan = (vu)(magnitude > 0x7bff) & 0x7f800000u;
  return (vf)((vu)value | inf_or_nan | ((u & 0x8000) << 16));
}
#endif

BK_INLINE vf widen(vb b, const int8_t*) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)b));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(read<int64_t>(&b))));
#else
  return __builtin_convertvector(b, vf);
#endif
}

BK_INLINE vf narrow(vf v, const float*) { return v; }

BK_INLINE vh narrow(vf v, const bf16*) {
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)v);  // rounds to nearest even; subnormal numbers become zero
#else
  vu u = (vu)v;
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vu quiet = (u >> 16) | 0x40;
  vu is_nan = (vu)(v != v);
  return __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), vh);
#endif
}

#if defined(__F16C__)
BK_INLINE vh narrow(vf v, const f16*) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
}
#else
BK_INLINE vh narrow(vf v, const f16*) {
  vu u = (vu)v, sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  // Normal numbers: rebase the exponent and round the 13 dropped bits to nearest even. Overflow runs into infinity.
  vu normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  normal = (vu)select((vi)(normal > 0x7c00), (vf)(vu{} + 0x7c00), (vf)normal);
  // Subnormal results: adding 1/2 aligns the mantissa so that the float addition rounds it.
  vu subnormal = (vu)((vf)magnitude + 0.5f) - 0x3f000000u;
  vu r = (vu)select((vi)(magnitude < 0x38800000u), (vf)subnormal, (vf)normal);
  vu nan = ((magnitude >> 13) & 0x3ff) | 0x7e00;
  r = (vu)select((vi)(magnitude > 0x7f800000u), (vf)nan, (vf)r);
  return __builtin_convertvector(r | sign, vh);
}
#endif

// To the nearest integer, half to even, of values in [-128, 127].
BK_INLINE vb narrow(vf v, const int8_t*) {
#if defined(__AVX512F__)
  return (vb)_mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)v));
#else
  const vf shifter = splat(0x1.8p23f);  // adding it rounds to an integer in the low bits
  return __builtin_convertvector((vi)(v + shifter) - (vi)shifter, vb);
#endif
}

template <class T>
struct Storage {
  typedef vh type;
};
template <>
struct Storage<float> {
  typedef vf type;
};
template <>
struct Storage<int8_t> {
  typedef vb type;
};

template <class T>
BK_INLINE vf load(const T* p) {
  return widen(read<typename Storage<T>::type>(p), p);
}
// One value.
template <class T>
BK_INLINE float load_one(const T* p) {
  T part[W] = {*p};
  return load(part)[0];
}
#if defined(__F16C__)
BK_INLINE float load_one(const f16* p) { return _cvtsh_ss(p->bits); }
#endif
template <class T>
BK_INLINE void store(T* p, vf v) {
  write(p, narrow(v, p));
}
// The last n < W elements of a row; the lanes beyond are zero.
template <class T>
BK_INLINE vf load(const T* p, int64_t n) {
  T part[W] = {};
  __builtin_memcpy(part, p, n * sizeof(T));
  return load(part);
}
// The same with `fill` in the lanes beyond.
template <class T>
BK_INLINE vf load_or(const T* p, int64_t n, float fill) {
  vf v = load(p, n);
  for (int i = 0; i < W; ++i) v[i] = i < n ? v[i] : fill;
  return v;
}
template <class T>
BK_INLINE void store(T* p, vf v, int64_t n) {
  T part[W];
  store(part, v);
  __builtin_memcpy(p, part, n * sizeof(T));
}
// What a stored value reads back as: the rounding of the storage type.
template <class T>
BK_INLINE vf rounded(vf v) {
  return widen(narrow(v, (const T*)nullptr), (const T*)nullptr);
}

// Sums of products of bfloat16 pairs, where one instruction takes 2 W of them.
#if defined(__AVX512BF16__)
template <class T>
constexpr bool kPairs = false;
template <>
constexpr bool kPairs<bf16> = true;
BK_INLINE vf add_products(vf acc, const void* a, const void* b) {
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)read<__m512i>(a), (__m512bh)read<__m512i>(b));
}
#else
template <class T>
constexpr bool kPairs = false;
BK_INLINE vf add_products(vf acc, const void*, const void*) { return acc; }
#endif

// Two vectors at once where the caller can: a full cache line in the 16-bit types, which a streaming store needs.
template <class T>
BK_INLINE void stream2(T* p, vf a, vf b) {
  auto x = narrow(a, p);
  auto y = narrow(b, p);
#if defined(__AVX512F__)
  if (sizeof(T) == 2) {
    __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(read<__m256i>(&x)), read<__m256i>(&y), 1);
    _mm512_stream_si512((__m512i*)p, both);
  } else {
    _mm512_stream_si512((__m512i*)p, read<__m512i>(&x));
    _mm512_stream_si512((__m512i*)(p + W), read<__m512i>(&y));
  }
#elif defined(__AVX2__)
  if (sizeof(T) == 2) {
    _mm256_stream_si256((__m256i*)p, _mm256_setr_m128i(read<__m128i>(&x), read<__m128i>(&y)));
  } else {
    _mm256_stream_si256((__m256i*)p, read<__m256i>(&x));
    _mm256_stream_si256((__m256i*)(p + W), read<__m256i>(&y));
  }
#else
  write(p, x);
  write(p + W, y);
#endif
}

// Asks for the cache line at p: the next row's, while this row's results are written, or this row's further on. The
// machine's own prefetcher starts anew at each page and follows fewer streams.
BK_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
constexpr int64_t kAhead = 1024;  // bytes
template <class T>
BK_INLINE void prefetch_ahead(const T* p) {
  prefetch((const char*)p + kAhead);
  if (2 * W * sizeof(T) > 64) prefetch((const char*)p + kAhead + 64);
}

// Moves what the last rows added up to into the total.
constexpr int64_t kRowsAtOnce = 16;
BK_INLINE void settle(const ColumnSums& sums, int64_t block, int64_t d) {
  if (!sums.recent) return;
  float* __restrict recent = sums.recent + block * d;
  double* __restrict total = sums.total + block * d;
  for (int64_t i = 0; i < d; ++i) {
    total[i] += recent[i];
    recent[i] = 0.0f;
  }
}

// Orders the streaming stores before what follows.
BK_INLINE void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
