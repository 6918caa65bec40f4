// New keys and values into a cache, token by token, rotated and quantized on the way.
#include "rotate.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

constexpr uint32_t kInfinity = 0x7f800000;

template <class T>
BK_INLINE const T* at(const Attention::Heads& x, int64_t batch, int64_t token) {
  return (const T*)x.data + batch * x.batch + token * x.token;
}

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

// A head in two pieces: the rotated one is in float32.
template <class T>
BK_INLINE void quantize_head(const float* rotated, int64_t rotary, const T* rest, int64_t n, int8_t* out,
                             float* scale) {
  vi bits = largest(rest, n, largest(rotated, rotary, vi{}));
  int32_t top = 0;
  for (int i = 0; i < W; ++i) top = bits[i] > top ? bits[i] : top;
  float most;
  __builtin_memcpy(&most, &top, sizeof most);
  bool finite = (uint32_t)top < kInfinity;
  *scale = finite ? most / 127.0f : __builtin_nanf("");
  if (finite && *scale > 0.0f) {
    quantize(rotated, rotary, *scale, out);
    quantize(rest, n, *scale, out + rotary);
  } else {
    __builtin_memset(out, 0, rotary + n);
  }
}

template <class T>
void tokens(const AppendKv& a, int64_t begin, int64_t end) {
  TokenAngles angles;
  alignas(64) float rotated[kMaxRotary];
  int64_t rotary = a.angles.rotary;
  for (int64_t r = begin; r < end; ++r) {
    int64_t batch = r / a.queries, token = r % a.queries;
    if (rotary) angles.read(a.angles, batch, token);
    // A head of floats; `rotary` elements of it are rotated.
    auto write = [&](const T* from, T* to, int64_t n, int64_t turned) __attribute__((always_inline)) {
      if (turned) rotate(a.angles, angles, from, to, false);
      __builtin_memcpy(to + turned, from + turned, (n - turned) * sizeof(T));
    };
    const T* q = at<T>(a.q, batch, token);
    T* out = (T*)at<T>(a.out, batch, token);
    for (int64_t h = 0; h < a.heads; ++h) write(q + h * a.q.head, out + h * a.out.head, a.d, rotary);

    int64_t position = a.lengths[batch] - a.queries + token, place = batch;
    if (position < 0) continue;  // an empty sequence
    if (a.block_table) {
      place = a.block_table[batch * a.table_stride + position / a.page];
      position %= a.page;
    }
    auto append = [&](const Attention::Heads& from, const Attention::Heads& cache, const Attention::Heads& scales,
                      int64_t n, int64_t turned) {
      const T* x = at<T>(from, batch, token);
      T* values = (T*)at<T>(cache, place, position);
      int8_t* bytes = (int8_t*)at<int8_t>(cache, place, position);
      float* scale = a.int8 ? (float*)at<float>(scales, place, position) : nullptr;
      for (int64_t h = 0; h < a.groups; ++h, x += from.head) {
        if (!a.int8) {
          write(x, values + h * cache.head, n, turned);
        } else {
          if (turned) rotate(a.angles, angles, x, rotated, false);
          quantize_head(rotated, turned, x + turned, n - turned, bytes + h * cache.head, scale + h * scales.head);
        }
      }
    };
    append(a.new_k, a.k, a.k_scale, a.d, rotary);
    append(a.new_v, a.v, a.v_scale, a.dv, 0);
  }
}

}  // namespace

void append_kv(const AppendKv& a, int64_t begin, int64_t end) {
  switch (a.type) {
    case Type::f32: return tokens<float>(a, begin, end);
    case Type::bf16: return tokens<bf16>(a, begin, end);
    case Type::f16: return tokens<f16>(a, begin, end);
  }
}

}  // namespace BK_ISA
}  // namespace bigkernels
