// More tokens: 16 rows of the weight are made into a panel, part of the depth at a time, in which 32 bits of each row
// lie side by side, and multiplied with blocks of tokens, whose 32 bits are broadcast. Weights stay as they are stored:
// turning 16 rows costs 4 shuffles a vector, a tenth of 16 tokens' products.
//
// A token's result does not depend on the other tokens, nor on where a call's rows begin.
#pragma once
#include "product_rows.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

constexpr int kRows = 16;
constexpr int V = kRows / W;
constexpr int64_t kSteps = 128;      // of 32 bits, in a part of the depth: 8 KB of a panel, and of 16 tokens
constexpr int64_t kPanels = 8;       // that are made before tokens pass by
constexpr int64_t kPartBlocks = 16;  // of 32 elements, at most, in such a part

// Part of the depth of 16 rows, and by what its groups are multiplied.
struct Panel {
  alignas(64) uint32_t line[kSteps][kRows];
  alignas(64) float scale[kPartBlocks][kRows];   // of each block of 32, or group
  alignas(64) float beside[kPartBlocks][kRows];  // of each group: what the tokens' sums count by
};

// Where a panel's rows are in the weight, and what part of the depth: elements [k, k + count), count rounded up.
struct Part {
  int64_t n, rows, k, left, count;
};

BK_INLINE int64_t part_depth(Form form) {
  switch (form) {
    case Form::bytes:
    case Form::quads: return 4 * kSteps;
    case Form::pairs:
    case Form::nibbles: return 2 * kSteps;
    default: return kSteps;
  }
}

// ---- making panels --------------------------------------------------------------------------------------------------

// f(line, lines of 16 rows turned) for each 64 bytes of the rows' part.
template <class F>
BK_INLINE void for_lines(const Weight& w, const Part& p, int64_t bytes, F f) {
  const uint8_t* first = w.codes + p.n * w.code_row + code_bytes(w.kind, p.k);
  for (int64_t at = 0; at < bytes; at += 64) {
    alignas(64) uint32_t lines[16][kRows];
    if (p.rows == kRows && at + 64 <= bytes) {
      transpose16(first + at, w.code_row, lines, 64);
    } else {
      alignas(64) uint8_t part[kRows][64] = {};
      for (int64_t r = 0; r < p.rows; ++r)
        __builtin_memcpy(part[r], first + r * w.code_row + at, bytes - at < 64 ? bytes - at : 64);
      transpose16(part, 64, lines, 64);
    }
    f(at / 64, lines);
  }
}

// Rows that are decoded to E before they are turned.
template <class E>
void decoded_panel(const Weight& w, const Part& p, bool scaled, Panel& panel) {
  constexpr int64_t kLine = 64 / sizeof(E);
  alignas(64) E memory[kRows][kSteps * 4 / sizeof(E)];
  Weight plain = w;
  const float ones = 1;
  for (int64_t r = 0; r < kRows; ++r) {
    if (r >= p.rows) {
      __builtin_memset(memory[r], 0, sizeof memory[r]);
      continue;
    }
    int64_t n = p.n + r;
    if (!scaled) {
      plain.kind = w.kind == Codes::int8g ? Codes::int8 : w.kind, plain.group = 0;
      plain.codes = w.codes + n * w.code_row, plain.scale = &ones, n = 0;
    }
    decode_row(plain, n, p.k, p.count, memory[r]);
  }
  for (int64_t i = 0; i < p.count / kLine; ++i)
    transpose16(memory[0] + i * kLine, sizeof memory[0], panel.line[16 * i], 64);
}

// 16 values side by side from p on, of which `rows` are there.
template <class N>
BK_INLINE void put_line(const N* p, int64_t rows, float* to) {
  if (rows == kRows) {
    for (int v = 0; v < kRows; v += W) store(to + v, load(p + v));
  } else {
    N part[kRows] = {};
    __builtin_memcpy(part, p, rows * sizeof(N));
    for (int v = 0; v < kRows; v += W) store(to + v, load(part + v));
  }
}

template <class N>
void transposed_panel(const Weight& w, const Part& p, Panel& panel) {
  const N* from = (const N*)(w.codes + p.k * w.code_row) + p.n;
  for (int64_t k = 0; k < p.count; ++k, from += w.code_row / (int64_t)sizeof(N))
    if (k < p.left)
      put_line(from, p.rows, (float*)panel.line[k]);
    else
      __builtin_memset(panel.line[k], 0, sizeof panel.line[k]);
}

void transposed_pairs(const Weight& w, const Part& p, Panel& panel) {
  for (int64_t i = 0; i < p.count / 2; ++i) {
    uint16_t two[2][kRows] = {};
    for (int64_t j = 0; j < 2; ++j)
      if (2 * i + j < p.left) __builtin_memcpy(two[j], w.codes + (p.k + 2 * i + j) * w.code_row + p.n * 2, p.rows * 2);
    for (int r = 0; r < kRows; ++r) panel.line[i][r] = two[0][r] | (uint32_t)two[1][r] << 16;
  }
}

// The scales of the groups, one a block of 32 or one a group, and what counts beside them.
template <Codes kKind>
void put_scales(const Weight& w, const Part& p, int64_t each, Panel& panel) {
  int64_t groups = (p.count + w.group - 1) / w.group;
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t i = 0; i < groups; ++i) {
      int64_t g = p.k / w.group + i, at = (p.n + r) * w.groups + g;
      float scale = 0, beside = 0;
      if (r < p.rows && g < w.groups) {
        if constexpr (kKind == Codes::book4) {
          scale = ((const float*)w.scale)[at];
        } else {
          scale = load_one((const f16*)w.scale + at);
          if (kKind == Codes::affine4) scale *= w.row_scale[p.n + r];
          if (kKind == Codes::int8g) beside = -(float)kOffset * scale;
          if (kKind == Codes::affine4) beside = -scale * load_one((const f16*)w.zero + at);
          if (kKind == Codes::affine4m) beside = load_one((const f16*)w.zero + at);
        }
      }
      panel.beside[i][r] = beside;
      for (int64_t j = 0; j < each; ++j) panel.scale[i * each + j][r] = scale;
    }
}

void make_scales(const Weight& w, const Part& p, Form form, Panel& panel) {
  int64_t each = form == Form::quads || form == Form::bytes ? w.group / 32 : 1;
  switch (w.kind) {
    case Codes::affine4: return put_scales<Codes::affine4>(w, p, each, panel);
    case Codes::affine4m: return put_scales<Codes::affine4m>(w, p, each, panel);
    case Codes::book4: return put_scales<Codes::book4>(w, p, each, panel);
    default: return put_scales<Codes::int8g>(w, p, each, panel);
  }
}

void make_panel(const Weight& w, const Part& p, Form form, Panel& panel) {
  int64_t bytes = code_bytes(w.kind, p.left < p.count ? p.left + (packed(w) ? p.left % 2 : 0) : p.count);
  if (p.left < p.count) __builtin_memset(panel.line, 0, sizeof panel.line);
  switch (form) {
    case Form::quads:
      for_lines(w, p, bytes, [&](int64_t at, uint32_t (*lines)[kRows]) __attribute__((always_inline)) {
        for (int i = 0; i < 16; ++i)
          for (int v = 0; v < kRows; v += W) {
            vu codes = read<vu>(lines[i] + v);
            uint32_t* to = panel.line[32 * at + 2 * i] + v;
            write(to, codes & 0x0f0f0f0f);
            write(to + kRows, (codes >> 4) & 0x0f0f0f0f);
          }
      });
      return make_scales(w, p, form, panel);
    case Form::bytes:
      for_lines(w, p, bytes, [&](int64_t at, uint32_t (*lines)[kRows]) __attribute__((always_inline)) {
        for (int i = 0; i < 16; ++i)
          for (int v = 0; v < kRows; v += W) {
            vu codes = read<vu>(lines[i] + v);
            write(panel.line[16 * at + i] + v, kOffset ? codes ^ 0x80808080u : codes);
          }
      });
      if (w.group) make_scales(w, p, form, panel);
      return;
    case Form::pairs:
      if (w.transposed) return transposed_pairs(w, p, panel);
      if (w.kind == Codes::bf16)
        return for_lines(w, p, bytes, [&](int64_t at, uint32_t (*lines)[kRows]) __attribute__((always_inline)) {
          __builtin_memcpy(panel.line[16 * at], lines, 1024);
        });
      decoded_panel<bf16>(w, p, false, panel);
      if (w.group) make_scales(w, p, form, panel);
      return;
#if defined(__AVX512BF16__)
    case Form::nibbles: {
      const __m512i table = code_table(w);
      for_lines(w, p, bytes, [&](int64_t at, uint32_t (*lines)[kRows]) __attribute__((always_inline)) {
        for (int i = 0; i < 16; ++i) {
          __m512i four[4];
          look_up_nibbles(read<__m512i>(lines[i]), table, four);
          for (int j = 0; j < 4; ++j) write(panel.line[64 * at + 4 * i + j], four[j]);
        }
      });
      return make_scales(w, p, form, panel);
    }
#endif
    default:
      if (!w.transposed) return decoded_panel<float>(w, p, true, panel);
      if (w.kind == Codes::f32) return transposed_panel<float>(w, p, panel);
      if (w.kind == Codes::bf16) return transposed_panel<bf16>(w, p, panel);
      return transposed_panel<f16>(w, p, panel);
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

template <int T>
struct Sixteen {
  vf acc[T][V];
};

template <int T>
BK_INLINE void add_floats(Sixteen<T>& s, const Panel& panel, int64_t steps, const float* x) {
  for (int64_t i = 0; i < steps; ++i, x += T) {
    vf line[V];
    for (int v = 0; v < V; ++v) line[v] = load((const float*)panel.line[i] + v * W);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      vf b = splat(x[t]);
      for (int v = 0; v < V; ++v) s.acc[t][v] += line[v] * b;
    }
  }
}

#if defined(__AVX512BF16__)
template <int T>
BK_INLINE void add_lines(vf* acc, const uint32_t (*line)[kRows], int64_t steps, const uint32_t* x) {
  for (int64_t i = 0; i < steps; ++i, x += T) {
    __m512bh w = (__m512bh)read<__m512i>(line[i]);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
      acc[t] = (vf)_mm512_dpbf16_ps((__m512)acc[t], w, (__m512bh)_mm512_set1_epi32((int)x[t]));
  }
}
#endif

BK_INLINE vi add_bytes(vi acc, vu line, uint32_t x, bool signed_codes) {
  vq tokens = (vq)(vu{} + x);
#if defined(__AVX512VNNI__)
  (void)signed_codes;
  return dot(acc, (vq)line, tokens);  // codes have no sign: kOffset was added
#else
  return signed_codes ? dot_signed(acc, (vq)line, tokens) : dot(acc, (vq)line, tokens);
#endif
}

// kGrouped: blocks have scales of the weight, too.
template <int T, bool kGrouped, bool kSigned>
BK_INLINE void add_integers(Sixteen<T>& s, const Panel& panel, int64_t blocks, const uint32_t* x, const float* scales) {
  for (int64_t b = 0; b < blocks; ++b, scales += T) {
    vi sum[T][V] = {};
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i, x += T) {
      vu line[V];
      for (int v = 0; v < V; ++v) line[v] = read<vu>(panel.line[8 * b + i] + v * W);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t)
        for (int v = 0; v < V; ++v) sum[t][v] = add_bytes(sum[t][v], line[v], x[t], kSigned);
    }
    for (int v = 0; v < V; ++v) {
      vf own = kGrouped ? load(panel.scale[b] + v * W) : splat(1);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        vf scale = splat(scales[t]);
        if (kGrouped) scale *= own;
        s.acc[t][v] += __builtin_convertvector(sum[t][v], vf) * scale;
      }
    }
  }
}

template <int T>
BK_INLINE void add_beside(Sixteen<T>& s, const Panel& panel, int64_t groups, const float* sums) {
  for (int64_t g = 0; g < groups; ++g, sums += T)
    for (int v = 0; v < V; ++v) {
      vf beside = load(panel.beside[g] + v * W);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) s.acc[t][v] += beside * sums[t];
    }
}

// What 16 rows' part of the depth gives, to where the parts before it are.
template <int T>
void add_part(const Weight& w, const Tokens& a, const Part& p, const Panel& panel, const char* block, int64_t count,
              bool last, float* out, int64_t stride) {
  Sixteen<T> s;
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) s.acc[t][v] = vf{};
  const int64_t left = p.left < p.count ? p.left : p.count;
  const int64_t group = w.group ? p.k / w.group : 0, groups = w.group ? (left + w.group - 1) / w.group : 0;
  const uint32_t* x = (const uint32_t*)block + p.k * a.size() / 4 * T;
  switch (a.form) {
    case Form::bytes:
    case Form::quads: {
      const float* scales = a.scales(block) + p.k / 32 * T;
      int64_t blocks = (left + 31) / 32;
      if (a.form == Form::quads)
        add_integers<T, true, false>(s, panel, blocks, x, scales);
      else if (w.group)
        add_integers<T, true, true>(s, panel, blocks, x, scales);
      else
        add_integers<T, false, true>(s, panel, blocks, x, scales);
      if (w.kind != Codes::int8 && (w.kind != Codes::int8g || kOffset))
        add_beside<T>(s, panel, groups, a.sums_of(block) + group * T);
      if (w.kind == Codes::int8 && kOffset && last)
        for (int t = 0; t < T; ++t)
          for (int v = 0; v < V; ++v) s.acc[t][v] -= kOffset * a.sums_of(block)[t];
      break;
    }
#if defined(__AVX512BF16__)
    case Form::pairs:
    case Form::nibbles:
      if (!w.group) {
        vf acc[T] = {};
        add_lines<T>(acc, panel.line, (left + 31) / 32 * 16, x);
        for (int t = 0; t < T; ++t) s.acc[t][0] = acc[t];
      }
      for (int64_t g = 0; g < groups; ++g) {
        vf acc[T] = {}, scale = load(panel.scale[g]);
        int64_t steps = w.group / 2, from = g * steps;
        if (from + steps > p.count / 2) steps = p.count / 2 - from;
        add_lines<T>(acc, panel.line + from, steps, x + from * T);
        for (int t = 0; t < T; ++t) s.acc[t][0] += acc[t] * scale;
      }
      if (w.kind == Codes::affine4 || w.kind == Codes::affine4m)
        add_beside<T>(s, panel, groups, a.sums_of(block) + group * T);
      break;
#endif
    default: add_floats<T>(s, panel, left, (const float*)x);
  }
  // Codes with a scale a row, where it is not in the panel.
  bool scaled =
      last && (w.kind == Codes::int8 || w.kind == Codes::fp8) && a.form != Form::floats && a.form != Form::rounded;
  for (int v = 0; v < V; ++v) {
    int64_t rows = p.rows - v * W;
    if (rows <= 0) break;
    vf scale = splat(1);
    if (scaled) {
      const float* from = (const float*)w.scale + p.n + v * W;
      scale = rows >= W ? load(from) : load(from, rows);
    }
    for (int64_t t = 0; t < count; ++t) {
      float* to = out + t * stride + v * W;
      vf y = s.acc[t][v];
      if (p.k) y += rows >= W ? load(to) : load(to, rows);
      if (scaled) y *= scale;
      rows >= W ? store(to, y) : store(to, y, rows);
    }
  }
}

template <int T>
void panels_of(const Weight& w, const Tokens& a, const void* ready, int64_t begin, int64_t end, float* out,
               int64_t stride, Panel* panels) {
  const int64_t depth = part_depth(a.form), at_once = a.blocks > 1 ? kPanels : 1;
  for (int64_t n = begin; n < end; n += at_once * kRows)
    for (int64_t k = 0; k < w.k; k += depth) {
      Part parts[kPanels];
      int64_t count = 0, left = w.k - k;
      for (; count < at_once && n + count * kRows < end; ++count) {
        Part& p = parts[count];
        p.n = n + count * kRows, p.rows = end - p.n < kRows ? end - p.n : kRows;
        p.k = k, p.left = left, p.count = left < depth ? (left + 127) / 128 * 128 : depth;
        make_panel(w, p, a.form, panels[count]);
      }
      for (int64_t b = 0; b < a.blocks; ++b) {
        int64_t first = b * T, tokens = a.m - first < T ? a.m - first : T;
        for (int64_t i = 0; i < count; ++i)
          add_part<T>(w, a, parts[i], panels[i], a.block(ready, b), tokens, k + depth >= w.k,
                      out + first * stride + parts[i].n - begin, stride);
      }
    }
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
