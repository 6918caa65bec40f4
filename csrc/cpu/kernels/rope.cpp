// Rotary embedding of queries and keys, token by token: a token's cos and sin are converted once for all heads.
#include "rotate.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

template <class T>
BK_INLINE void heads(const Rope& a, const Rope::Heads& h, int64_t batch, int64_t token, const TokenAngles& angles) {
  const T* in = (const T*)h.in + batch * h.in_batch + token * h.in_token;
  T* out = (T*)h.out + batch * h.out_batch + token * h.out_token;
  for (int64_t i = 0; i < h.heads; ++i, in += h.in_head, out += h.out_head) {
    rotate(a.angles, angles, in, out, a.inverse);
    int64_t rotary = a.angles.rotary;
    if (rotary < a.d) __builtin_memcpy(out + rotary, in + rotary, (a.d - rotary) * sizeof(T));
  }
}

template <class T>
void tokens(const Rope& a, int64_t begin, int64_t end) {
  TokenAngles angles;
  for (int64_t r = begin; r < end; ++r) {
    int64_t batch = r / a.length, token = r % a.length;
    angles.read(a.angles, batch, token);
    heads<T>(a, a.q, batch, token, angles);
    heads<T>(a, a.k, batch, token, angles);
  }
}

}  // namespace

void rope(const Rope& a, int64_t begin, int64_t end) {
  by_type(a.type, [&](auto t) { tokens<decltype(t)>(a, begin, end); });
}

}  // namespace BK_ISA
}  // namespace bigkernels
