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
    default: return;
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

void from_panels(const Weight& w, const Tokens& a, const void* ready, int64_t begin, int64_t end, float* out,
                 int64_t stride) {
  auto of = [&](auto count) __attribute__((always_inline)) {
    stored_product<decltype(count)::value>(w, a, ready, begin, end, out, stride);
  };
  switch (a.count) {
    case 1: return of(Count<1>());
    case 2: return of(Count<2>());
#if defined(__AVX2__)
    case 3: return of(Count<3>());
    case 4: return of(Count<4>());
    case 5: return of(Count<5>());
    case 6: return of(Count<6>());
#endif
#if defined(__AVX512F__)
    case 7: return of(Count<7>());
    case 8: return of(Count<8>());
#endif
    default: return;
  }
}

}  // namespace

int64_t panel_bytes(const Weight& w, int32_t integers) {
  const Form form = form_of(w, integers, 1);
  if (is_blocks(w.kind)) return w.n && w.k ? block_panel_bytes(w) : 0;
  if (!w.n || !w.k || (form != Form::quads && form != Form::bytes && form != Form::nibbles)) return 0;
  switch (w.kind) {
    case Codes::affine4: return Stored<Codes::affine4>::bytes(w);
    case Codes::affine4m: return Stored<Codes::affine4m>::bytes(w);
    case Codes::book4: return Stored<Codes::book4>::bytes(w);
    case Codes::int8g: return Stored<Codes::int8g>::bytes(w);
    default: return Stored<Codes::int8>::bytes(w);
  }
}

void make_panels(const Weight& w, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    uint8_t* to = (uint8_t*)w.panels + i * w.panel_step;
    if (is_blocks(w.kind)) {
      make_block_panel(w, i * kRows, to);
      continue;
    }
    switch (w.kind) {
      case Codes::affine4: make_stored<Codes::affine4>(w, i * kRows, to); break;
      case Codes::affine4m: make_stored<Codes::affine4m>(w, i * kRows, to); break;
      case Codes::book4: make_stored<Codes::book4>(w, i * kRows, to); break;
      case Codes::int8g: make_stored<Codes::int8g>(w, i * kRows, to); break;
      default: make_stored<Codes::int8>(w, i * kRows, to);
    }
  }
}

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
  if (is_blocks(w.kind) && (a.by_panels || a.few)) {
    if (a.few) return few_blocks(w, integers, ready, m, begin, end, out, stride);
    return a.integer() ? integers_from_block_panels(w, integers, ready, m, begin, end, out, stride)
                       : floats_from_block_panels(w, integers, ready, m, begin, end, out, stride);
  }
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
