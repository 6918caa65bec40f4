// New keys and values into a cache, token by token, rotated and quantized on the way.
#include "cache_codes.h"
#include "rotate.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

template <class T>
BK_INLINE const T* at(const Attention::Heads& x, int64_t batch, int64_t token) {
  return (const T*)x.data + batch * x.batch + token * x.token;
}

template <class T>
void tokens(const AppendKv& a, int64_t begin, int64_t end) {
  TokenAngles angles;
  alignas(64) float rotated[kMaxRotary];
  int64_t rotary = a.angles.rotary;
  for (int64_t r = begin; r < end; ++r) {
    int64_t batch = r / a.queries, token = r % a.queries;
    if (rotary) angles.read(a.angles, batch, token);
    // A head of floats; the first `width` elements of it are rotated.
    auto write = [&](const T* from, T* to, int64_t n, int64_t width) __attribute__((always_inline)) {
      if (width) rotate(a.angles, angles, from, to, false);
      __builtin_memcpy(to + width, from + width, (n - width) * sizeof(T));
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
                      int64_t n, int64_t width) {
      const T* x = at<T>(from, batch, token);
      T* values = (T*)at<T>(cache, place, position);
      int8_t* bytes = (int8_t*)at<int8_t>(cache, place, position);
      float* scale = a.int8 ? (float*)at<float>(scales, place, position) : nullptr;
      for (int64_t h = 0; h < a.groups; ++h, x += from.head) {
        if (!a.int8) {
          write(x, values + h * cache.head, n, width);
        } else {
          if (width) rotate(a.angles, angles, x, rotated, false);
          quantize_head(rotated, width, x + width, n - width, bytes + h * cache.head, scale + h * scales.head);
        }
      }
    };
    append(a.new_k, a.k, a.k_scale, a.d, rotary);
    append(a.new_v, a.v, a.v_scale, a.dv, 0);
  }
}

}  // namespace

void append_kv(const AppendKv& a, int64_t begin, int64_t end) {
  by_type(a.type, [&](auto t) { tokens<decltype(t)>(a, begin, end); });
}

}  // namespace BK_ISA
}  // namespace bigkernels
