// A head of keys or values as int8 codes with one scale.
#pragma once
#include <bigkernels/vec.h>

namespace bigkernels {
namespace BK_ISA {
namespace {

constexpr uint32_t kInfinityBits = 0x7f800000;

// The largest magnitude as an integer: of NaN and infinity too, which comparisons of floats would lose.
template <class T>
BK_INLINE vi largest(const T* x, int64_t n, vi most) {
  auto more = [&](vf v) {
    vi bits = (vi)vabs(v);
    most = (vi)select(bits > most, (vf)bits, (vf)most);
  };
  int64_t i = 0;
  for (; i + W <= n; i += W) more(load(x + i));
  if (i < n) more(load(x + i, n - i));
  return most;
}

// Divisions and not products with 1 / scale, which would round otherwise than the definition.
template <class T>
BK_INLINE void quantize(const T* x, int64_t n, float scale, int8_t* out) {
  auto one = [&](vf v) { return vmax(splat(-127.0f), vmin(splat(127.0f), v / scale)); };
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, one(load(x + i)));
  if (i < n) store(out + i, one(load(x + i, n - i)), n - i);
}

// A head in two parts: the rotated one is in float32.
template <class T>
BK_INLINE void quantize_head(const float* rotated, int64_t rotary, const T* rest, int64_t n, int8_t* out,
                             float* scale) {
  vi bits = largest(rest, n, largest(rotated, rotary, vi{}));
  int32_t top = 0;
  for (int i = 0; i < W; ++i) top = bits[i] > top ? bits[i] : top;
  float most;
  __builtin_memcpy(&most, &top, sizeof most);
  bool finite = (uint32_t)top < kInfinityBits;
  *scale = finite ? most / 127.0f : __builtin_nanf("");
  if (finite && *scale > 0.0f) {
    quantize(rotated, rotary, *scale, out);
    quantize(rest, n, *scale, out + rotary);
  } else {
    __builtin_memset(out, 0, rotary + n);
  }
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
