// Products of a step's tokens with weights: from panels that were made of codes before, for a few tokens; else as they
// are stored, along rows for a few tokens, by panels that are made in passing for more.
#include "product_stored.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

// Along rows, in float32.
void few_floats(const Weight& w, const Tokens& a, const void* ready, int64_t begin, int64_t end, float* out,
                int64_t stride) {
#define BK_ROWS(kind)                                                               \
  case Codes::kind:                                                                 \
    return a.m == 1 ? float_rows<Codes::kind>(w, a, ready, begin, end, out, stride) \
                    : float_tiles<Codes::kind>(w, a, ready, begin, end, out, stride)
  switch (w.kind) {
    BK_ROWS(f32);
    BK_ROWS(bf16);
    BK_ROWS(f16);
    BK_ROWS(int8);
    BK_ROWS(fp8);
    BK_ROWS(affine4);
    BK_ROWS(book4);
    BK_ROWS(affine4m);
    BK_ROWS(int8g);
  }
#undef BK_ROWS
}

template <int T>
void few(const Weight& w, const Tokens& a, const void* ready, int64_t begin, int64_t end, float* out, int64_t stride) {
  auto by_group = [&](auto run) __attribute__((always_inline)) {
    switch (w.group) {
      case 64: return run(Count<2>());
      case 128: return run(Count<4>());
      default: return run(Count<1>());
    }
  };
#define BK_ROWS(name, ...) name<__VA_ARGS__>(w, a, ready, begin, end, out, stride)
  if (w.transposed) {
    switch (w.kind) {
      case Codes::f32: return BK_ROWS(column_rows, float, T);
      case Codes::bf16: return BK_ROWS(column_rows, bf16, T);
      default: return BK_ROWS(column_rows, f16, T);
    }
  }
  switch (a.form) {
    case Form::quads:
      return by_group([&](auto blocks) __attribute__((always_inline)) {
        if (w.kind == Codes::affine4)
          BK_ROWS(integer_rows, Codes::affine4, decltype(blocks)::value, T);
        else
          BK_ROWS(integer_rows, Codes::affine4m, decltype(blocks)::value, T);
      });
    case Form::bytes:
      if (w.kind == Codes::int8) return BK_ROWS(integer_rows, Codes::int8, 1, T);
      return by_group([&](auto blocks) __attribute__((always_inline)) {
        BK_ROWS(integer_rows, Codes::int8g, decltype(blocks)::value, T);
      });
#if defined(__AVX512BF16__)
    case Form::pairs:
      switch (w.kind) {
        case Codes::bf16: return BK_ROWS(pair_rows, Codes::bf16, 0, T);
        case Codes::fp8: return BK_ROWS(pair_rows, Codes::fp8, 0, T);
        case Codes::int8: return BK_ROWS(pair_rows, Codes::int8, 0, T);
        default: break;
      }
      return by_group([&](auto blocks) __attribute__((always_inline)) {
        BK_ROWS(pair_rows, Codes::int8g, decltype(blocks)::value, T);
      });
    case Form::nibbles:
      return by_group([&](auto blocks) __attribute__((always_inline)) {
        constexpr int kBlocks = decltype(blocks)::value;
        if (w.kind == Codes::affine4) return BK_ROWS(nibble_rows, Codes::affine4, kBlocks, T);
        if (w.kind == Codes::affine4m) return BK_ROWS(nibble_rows, Codes::affine4m, kBlocks, T);
        BK_ROWS(nibble_rows, Codes::book4, kBlocks, T);
      });
#endif
    default: break;
  }
#undef BK_ROWS
}

}  // namespace

int32_t product_form(const Weight& w, int32_t integers) {
  return Tokens(w, integers, 1).number() | Tokens(w, integers, kTiled + 1).number() << 16;
}

int64_t product_ready(const Weight& w, int32_t integers, int64_t m) {
  Tokens a(w, integers, m);
  return a.blocks * a.bytes;
}

void product_prepare(const Weight& w, int32_t integers, const float* x, int64_t stride, int64_t m, int64_t begin,
                     int64_t end, void* ready) {
  Tokens a(w, integers, m);
  prepare_tokens(a, x, stride, begin, end, ready);
}

int64_t product_workspace(const Weight& w, int32_t integers, int64_t m, int64_t) {
  const Tokens a(w, integers, m);
  return a.few || a.by_panels ? 0 : (m <= kMost ? 1 : kPanels) * (int64_t)sizeof(Panel) + 64;
}

void product(const Weight& w, int32_t integers, const void* ready, int64_t m, int64_t begin, int64_t end, float* out,
             int64_t stride, void* workspace) {
  Tokens a(w, integers, m);
  if (m == 0 || begin >= end) return;
  if (w.k == 0) {
    for (int64_t t = 0; t < m; ++t) __builtin_memset(out + t * stride, 0, (end - begin) * sizeof(float));
    return;
  }
  Panel* panels = (Panel*)(((uintptr_t)workspace + 63) / 64 * 64);
  auto by_panels = [&](auto count) __attribute__((always_inline)) {
    panels_of<decltype(count)::value>(w, a, ready, begin, end, out, stride, panels);
  };
  if (a.by_panels) return from_panels(w, a, ready, begin, end, out, stride);
  if (a.few) {
    if (!w.transposed && (a.form == Form::floats || a.form == Form::rounded))
      return few_floats(w, a, ready, begin, end, out, stride);
    switch (m) {
      case 1: return few<1>(w, a, ready, begin, end, out, stride);
      case 2: return few<2>(w, a, ready, begin, end, out, stride);
      case 3: return few<3>(w, a, ready, begin, end, out, stride);
      default: return few<4>(w, a, ready, begin, end, out, stride);
    }
  }
  switch (a.count) {
    case 2: return by_panels(Count<2>());
#if defined(__AVX2__)
    case 4: return by_panels(Count<4>());
    case 6: return by_panels(Count<6>());
#endif
#if defined(__AVX512F__)
    case 8: return by_panels(Count<8>());
    case 10: return by_panels(Count<10>());
    case 12: return by_panels(Count<12>());
    case 14: return by_panels(Count<14>());
    case 16: return by_panels(Count<16>());
#endif
    default: return;
  }
}

}  // namespace BK_ISA
}  // namespace bigkernels
