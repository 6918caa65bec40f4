// Linear layers, a few tokens: the weight is read once, as it is stored, by the products of the step program.
#include "linear_tiles.h"
#include "product_tokens.h"

namespace bigkernels {
namespace BK_ISA {

int64_t product_ready(const Weight&, int32_t, int64_t);
void product_prepare(const Weight&, int32_t, const float*, int64_t, int64_t, int64_t, int64_t, void*);
void product(const Weight&, int32_t, const void*, int64_t, int64_t, int64_t, float*, int64_t, void*);

namespace {

constexpr int64_t kMostFew = 16;   // tokens
constexpr int64_t kColumns = 128;  // of the result that are made before they are written

// Tokens stay what they are: those of bfloat16 in pairs, others in float32.
BK_INLINE int32_t integers_of(const Linear& a) { return a.type == Type::bf16 ? 2 : -1; }

template <class X>
void product_tokens(const Linear& a, void* ready) {
  float* rows = (float*)((char*)ready + product_ready(a, integers_of(a), a.m));
  for (int64_t m = 0; m < a.m; ++m) {
    const X* x = (const X*)a.in.data + m * a.in.stride;
    float* row = rows + m * a.k;
    int64_t k = 0;
    for (; k + W <= a.k; k += W) store(row + k, load(x + k));
    if (k < a.k) store(row + k, load(x + k, a.k - k), a.k - k);
  }
  product_prepare(a, integers_of(a), rows, a.k, a.m, 0, a.m, ready);  // at once: 16 are put into order together
}

// `count` columns of the result, from column n on.
template <class Y>
void write_columns(const Linear& a, const float* y, int64_t n, int64_t count) {
  for (int64_t m = 0; m < a.m; ++m, y += kColumns) {
    Y* out = (Y*)a.out + m * a.n + n;
    for (int64_t i = 0; i < count; i += W) {
      const int64_t left = count - i;
      vf v = load(y + i);
      if (a.bias) v += left >= W ? load(a.bias + n + i) : load(a.bias + n + i, left);
      left >= W ? store(out + i, v) : store(out + i, v, left);
    }
  }
}

}  // namespace

int64_t linear_few_most(const Linear& a) {
#if defined(__AMX_BF16__)
  if (tiles::supports(a)) return tiles::kMost;
#endif
  (void)a;
  return kMostFew;
}

int64_t linear_few_size(const Linear& a) {
#if defined(__AMX_BF16__)
  if (tiles::supports(a)) return tiles::ready_bytes(a);
#endif
  return product_ready(a, integers_of(a), a.m) + a.m * a.k * (int64_t)sizeof(float);
}

void linear_few_prepare(const Linear& a, void* ready) {
#if defined(__AMX_BF16__)
  if (tiles::supports(a)) return tiles::prepare(a, (uint16_t*)ready);
#endif
  by_type(a.type, [&](auto t) { product_tokens<decltype(t)>(a, ready); });
}

void linear_few(const Linear& a, const void* ready, int64_t begin, int64_t end) {
#if defined(__AMX_BF16__)
  if (tiles::supports(a)) return tiles::run(a, (const uint16_t*)ready, begin, end);
#endif
  alignas(64) float y[kMostFew][kColumns];
  alignas(64) char workspace[kProductWorkspace];
  for (int64_t n = begin; n < end; n += kColumns) {
    int64_t count = end - n < kColumns ? end - n : kColumns;
    product(a, integers_of(a), ready, a.m, n, n + count, y[0], kColumns, workspace);
    by_type(a.out_type, [&](auto t) { write_columns<decltype(t)>(a, y[0], n, count); });
  }
}

}  // namespace BK_ISA
}  // namespace bigkernels
