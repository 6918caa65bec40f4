// More tokens: 16 rows of the weight are made into a panel, part of the depth at a time, in which 32 bits of each row
// lie side by side, and multiplied with blocks of tokens, whose 32 bits are broadcast. Weights stay as they are stored:
// transposing 16 rows costs 4 shuffles a vector, a tenth of 16 tokens' products.
//
// A token's result does not depend on the other tokens, nor on where a call's rows begin.
#pragma once
#include "product_rows.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

constexpr int kRows = 16;
constexpr int V = kRows / W;
constexpr int64_t kSteps = 192;  // of 32 bits, in a part of the depth: 12 KB of a panel, and of 16 tokens
constexpr int64_t kPanels = 8;   // that are made before tokens pass by
constexpr int64_t kGroups = 32;  // that a part may have

// Part of the depth of 16 rows, and by what its groups are multiplied.
struct Panel {
  alignas(64) uint32_t line[kSteps][kRows];
  // Of the part's groups: the scales, and what the tokens' sums count by.
  alignas(64) float scale[kGroups][kRows];
  alignas(64) float beside[kGroups][kRows];
};

static_assert(kPanels * sizeof(Panel) + 64 <= kProductWorkspace);

// Where a panel's rows are in the weight, and what part of the depth: elements [k, k + count), count rounded up.
struct Part {
  int64_t n, rows, k, left, count;
  const uint8_t* next;  // the part that is made after this one: its first row
};

// How deep the parts of a weight are: few, about the same, and each of whole groups.
BK_INLINE int64_t part_depth(Form form, int64_t k) {
  const bool integer = form == Form::bytes || form == Form::quads,
             paired = form == Form::pairs || form == Form::nibbles;
  const int64_t most = kSteps * (integer ? 4 : paired ? 2 : 1), unit = integer || paired ? 128 : 64;
  const int64_t parts = (k + most - 1) / most;
  return ((k + parts - 1) / parts + unit - 1) / unit * unit;
}
static_assert(kSteps % 64 == 0);

// ---- making panels --------------------------------------------------------------------------------------------------

// transpose16 of 16 rows of 32-bit lanes, with shuffles on AVX2, too.
#if defined(__AVX2__)
BK_INLINE void transpose_lines(const void* from, int64_t from_bytes, void* to, int64_t to_bytes) {
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 16; j += 8)
      transpose8((const char*)from + i * from_bytes + j * 4, from_bytes, (char*)to + j * to_bytes + i * 4, to_bytes);
}
#else
BK_INLINE void transpose_lines(const void* from, int64_t from_bytes, void* to, int64_t to_bytes) {
  transpose16(from, from_bytes, to, to_bytes);
}
#endif

// The lines of 16 rows' part as they are stored, transposed. The lines of `next` are asked for meanwhile.
void stored_panel(const Weight& w, const Part& p, int64_t bytes, Panel& panel) {
  const uint8_t *first = w.codes + p.n * w.code_row + code_bytes(w.kind, p.k), *next = p.next;
  for (int64_t at = 0; at < bytes; at += 64) {
    uint32_t* to = panel.line[at / 4];
    if (p.rows == kRows && at + 64 <= bytes) {
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(next + r * w.code_row + at, 0, 2);
      transpose_lines(first + at, w.code_row, to, 64);
    } else {
      alignas(64) uint8_t part[kRows][64] = {};
      for (int64_t r = 0; r < p.rows; ++r)
        __builtin_memcpy(part[r], first + r * w.code_row + at, bytes - at < 64 ? bytes - at : 64);
      transpose_lines(part, 64, to, 64);
    }
  }
}

// Rows that are decoded to float32 before they are transposed.
void decoded_panel(const Weight& w, const Part& p, Panel& panel) {
  alignas(64) float memory[kRows][kSteps];
  for (int64_t r = 0; r < kRows; ++r)
    if (r < p.rows)
      decode_row(w, p.n + r, p.k, p.count, memory[r]);
    else
      __builtin_memset(memory[r], 0, sizeof memory[r]);
  for (int64_t i = 0; i < p.count; i += 16) transpose_lines(memory[0] + i, sizeof memory[0], panel.line[i], 64);
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

// The scales of a part's groups.
template <Codes kKind>
void put_scales(const Weight& w, const Part& p, Panel& panel) {
  constexpr bool kBeside = kKind == Codes::affine4 || kKind == Codes::affine4m || (kKind == Codes::int8g && kOffset);
  const int64_t first = p.k / w.group, all = p.left <= p.count ? w.groups - first : p.count / w.group;
  for (int64_t at_once = 0; at_once < all; at_once += 16) {
    alignas(64) float scales[kRows][16], beside[kRows][16];
    for (int64_t r = 0; r < kRows; ++r)
      for (int g = 0; g < 16; g += W) {
        const int64_t here = first + at_once + g;
        const int64_t count = r < p.rows ? w.groups - here : 0, at = (p.n + r) * w.groups + here;
        vf scale{}, more{};
        if (count > 0) {
          if constexpr (kKind == Codes::book4) {
            const float* from = (const float*)w.scale + at;
            scale = count >= W ? load(from) : load(from, count);
          } else {
            scale = load_some((const f16*)w.scale + at, count);
          }
          if constexpr (kBeside) more = Coded<kKind>::beside(w, at, count);
          if constexpr (kKind == Codes::affine4) scale *= w.row_scale[p.n + r], more *= w.row_scale[p.n + r];
        }
        store(scales[r] + g, scale), store(beside[r] + g, more);
      }
    transpose_lines(scales, 64, panel.scale[at_once], 64);
    if constexpr (kBeside) transpose_lines(beside, 64, panel.beside[at_once], 64);
  }
}

void make_scales(const Weight& w, const Part& p, Panel& panel) {
  switch (w.kind) {
    case Codes::affine4: return put_scales<Codes::affine4>(w, p, panel);
    case Codes::affine4m: return put_scales<Codes::affine4m>(w, p, panel);
    case Codes::book4: return put_scales<Codes::book4>(w, p, panel);
    default: return put_scales<Codes::int8g>(w, p, panel);
  }
}

void make_panel(const Weight& w, const Part& p, Form form, Panel& panel) {
  int64_t bytes = code_bytes(w.kind, p.left < p.count ? p.left + (packed(w) ? p.left % 2 : 0) : p.count);
  switch (form) {
    case Form::quads:
    case Form::bytes:
    case Form::nibbles: stored_panel(w, p, bytes, panel); break;
    case Form::pairs: w.transposed ? transposed_pairs(w, p, panel) : stored_panel(w, p, bytes, panel); break;
    default:
      if (!w.transposed) return w.kind == Codes::f32 ? stored_panel(w, p, bytes, panel) : decoded_panel(w, p, panel);
      if (w.kind == Codes::f32) return transposed_panel<float>(w, p, panel);
      if (w.kind == Codes::bf16) return transposed_panel<bf16>(w, p, panel);
      return transposed_panel<f16>(w, p, panel);
  }
  if (w.group) make_scales(w, p, panel);
}

// ---- products -------------------------------------------------------------------------------------------------------

// Where the products read their lines, four at a time: a panel.
struct PanelLines {
  const uint32_t (*line)[kRows];

  BK_INLINE void get(const PanelLines& p, int64_t i, vu (*to)[V]) {
    for (int j = 0; j < 4; ++j)
      for (int v = 0; v < V; ++v) to[j][v] = read<vu>(p.line[i + j] + v * W);
  }
};

#if defined(__AVX512F__)
// Or the rows themselves, where one block of tokens is all that meets them: 16 loads and 8 shuffles are done among the
// products. Rows that lie a multiple of 2 KB apart share few sets of the first-level cache: their lines are copied to
// where they do not, one after the other, 64 bytes ahead of the products.
struct RowLines {
  const uint8_t *first, *next;
  int64_t stride, bytes;
  bool crowded;
  uint8_t (*copies)[kRows][64];  // two

  RowLines(const Weight& w, const Part& p, int64_t size, void* memory)
      : first(w.codes + p.n * w.code_row + code_bytes(w.kind, p.k)), next(p.next), stride(w.code_row), bytes(size) {
    crowded = stride % 2048 == 0 && bytes % 64 == 0, copies = (uint8_t (*)[kRows][64])memory;
    if (crowded)
      for (int r = 0; r < kRows; ++r) write(copies[0][r], read<__m512i>(first + r * stride));
  }

  BK_INLINE void get(const RowLines& p, int64_t i, vu (*to)[V]) {
    const uint8_t* at = p.first + 4 * i;
    const int64_t row = i % 16;  // four rows are asked for, and copied, with four lines
    {
      const uint8_t* line = at - 4 * row + row * p.stride;
      const int64_t ahead = 4 * (i - row) + kAheadOfRow;
      const uint8_t* far = ahead < p.bytes ? line + kAheadOfRow : p.next + (ahead - p.bytes) + row * p.stride;
      for (int r = 0; r < 4; ++r) __builtin_prefetch(far + r * p.stride, 0, 2);
      if (p.crowded && 4 * (i - row) + 64 < p.bytes)
        for (int r = 0; r < 4; ++r) write(p.copies[(i / 16 + 1) % 2][row + r], read<__m512i>(line + 64 + r * p.stride));
    }
    int64_t stride = p.stride;
    if (p.crowded) at = p.copies[i / 16 % 2][0] + 4 * row, stride = 64;
    __m512i a[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const uint8_t* row = at + r * stride;
      a[r] = _mm512_castsi128_si512(read<__m128i>(row));
      a[r] = _mm512_inserti32x4(a[r], read<__m128i>(row + 4 * stride), 1);
      a[r] = _mm512_inserti32x4(a[r], read<__m128i>(row + 8 * stride), 2);
      a[r] = _mm512_inserti32x4(a[r], read<__m128i>(row + 12 * stride), 3);
    }
    __m512i even = _mm512_unpacklo_epi32(a[0], a[1]), odd = _mm512_unpacklo_epi32(a[2], a[3]);
    to[0][0] = (vu)_mm512_unpacklo_epi64(even, odd), to[1][0] = (vu)_mm512_unpackhi_epi64(even, odd);
    even = _mm512_unpackhi_epi32(a[0], a[1]), odd = _mm512_unpackhi_epi32(a[2], a[3]);
    to[2][0] = (vu)_mm512_unpacklo_epi64(even, odd), to[3][0] = (vu)_mm512_unpackhi_epi64(even, odd);
  }
  static constexpr int64_t kAheadOfRow = 256;
};
#endif

template <int T>
struct Sixteen {
  vf acc[T][V];
};

// `steps` products for each row. Sums of `depth` of them are added to what there is, and of the last ones beyond a
// multiple of 32: chains over a whole row would be less accurate. The places are the same wherever parts begin.
template <int T, class Lines>
BK_INLINE void add_floats(Sixteen<T>& s, const Lines& lines, int64_t steps, int64_t depth, const float* x) {
  for (int64_t from = 0, end = 0; from < steps; from = end) {
    end = steps - from > depth ? from + depth : steps - from > 32 ? from + (steps - from) / 32 * 32 : steps;
    vf acc[T][V] = {};
    for (int64_t i = from; i < end; i += 4) {
      vu four[4][V];
      Lines::get(lines, i, four);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j, x += T)
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
          vf b = splat(x[t]);
          for (int v = 0; v < V; ++v) acc[t][v] = multiply_add((vf)four[j][v], b, acc[t][v]);
        }
    }
    for (int t = 0; t < T; ++t)
      for (int v = 0; v < V; ++v) s.acc[t][v] += acc[t][v];
  }
}

template <int T>
BK_INLINE void add_beside(Sixteen<T>& s, const float* by, const float* sums) {
  for (int v = 0; v < V; ++v) {
    const vf beside = load(by + v * W);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) s.acc[t][v] = multiply_add(beside, splat(sums[t]), s.acc[t][v]);
  }
}

#if defined(__AVX512BF16__)
// acc + w times two numbers that are read for all lanes. gcc 12 reads them by an instruction of its own, early, and
// then has no registers left for 16 sums.
BK_INLINE void add_pair_of(vf& acc, __m512i w, const uint32_t* x) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*x));
}

// The pairs that a line has of each row.
struct PlainPairs {
  static constexpr int kCount = 1;
  BK_INLINE void split(const PlainPairs&, __m512i line, __m512i* w) { w[0] = line; }
};
template <Codes kKind>
struct BytePairs {
  static constexpr int kCount = 2;
  BK_INLINE void split(const BytePairs&, __m512i line, __m512i* w) { split_bytes<kKind>(line, w); }
};
struct NibblePairs {
  static constexpr int kCount = 4;
  __m512i table;
  BK_INLINE void split(const NibblePairs& p, __m512i line, __m512i* w) { look_up_nibbles(line, p.table, w); }
};

template <int T, class Pairs, class Lines>
BK_INLINE void add_lines(vf* acc, const Pairs& pairs, const Lines& lines, int64_t from, int64_t end,
                         const uint32_t* x) {
  const Lines own = lines;  // nothing that is written changes it
  for (int64_t i = from; i < end; i += 4) {
    vu four[4][V];
    Lines::get(own, i, four);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      __m512i w[Pairs::kCount];
      Pairs::split(pairs, (__m512i)four[j][0], w);
#pragma GCC unroll 4
      for (int c = 0; c < Pairs::kCount; ++c, x += T)
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) add_pair_of(acc[t], w[c], x + t);
    }
  }
}

// `left` values of 16 rows, in groups of `group`, or 0. The tokens' sums over a group count by `beside`, or null. They
// come with their group: so the order of a row's sums does not depend on its parts.
template <int T, class Pairs, class Lines>
BK_INLINE void add_pairs(Sixteen<T>& s, const Pairs& pairs, const Lines& lines, int64_t left, int64_t group,
                         const float (*scale)[kRows], const float (*beside)[kRows], const float* sums,
                         const uint32_t* x) {
  constexpr int64_t kValues = 2 * Pairs::kCount;  // of a line
  const int64_t size = group ? group : left;
  for (int64_t from = 0; from < left; from += size, ++scale) {
    const int64_t count = left - from < size ? (left - from + 31) / 32 * 32 : (size + 31) / 32 * 32;
    vf acc[T];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) acc[t] = group ? vf{} : s.acc[t][0];
    add_lines<T>(acc, pairs, lines, from / kValues, (from + count) / kValues, x + from / 2 * T);
    if (group) {
      const vf own = load(*scale);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) s.acc[t][0] = multiply_add(acc[t], own, s.acc[t][0]);
      if (beside) add_beside<T>(s, *beside++, sums), sums += T;
    } else {
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) s.acc[t][0] = acc[t];
    }
  }
}
#endif

// Four products for each row: of 4-bit codes, or of codes of 8 bits, which have a sign where no kOffset was added.
template <bool kQuads>
BK_INLINE void add_bytes(vi& acc, vu line, const uint32_t* x) {
#if defined(__AVX512VNNI__)
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(line), "m"(*x));
#else
  vq tokens = (vq)(vu{} + *x);
  acc = kQuads || kOffset ? dot(acc, (vq)line, tokens) : dot_signed(acc, (vq)line, tokens);
#endif
}

// kGrouped: blocks have scales of the weight, too.
template <int T, bool kGrouped, bool kQuads, class Lines>
BK_INLINE void add_integers(Sixteen<T>& s, const Lines& lines, const float (*own_scales)[kRows], int64_t each,
                            int64_t blocks, const float (*beside)[kRows], const float* sums, const uint32_t* x,
                            const float* scales) {
  const Lines own = lines;
  constexpr int kLines = kQuads ? 4 : 8, kParts = kQuads ? 2 : 1;
  for (int64_t b = 0; b < blocks; ++b, scales += T) {
    vi sum[T][V] = {};
#pragma GCC unroll 2
    for (int i = 0; i < kLines; i += 4) {
      vu four[4][V];
      Lines::get(own, kLines * b + i, four);
#pragma GCC unroll 8
      for (int j = 0; j < 4 * kParts; ++j, x += T) {
        vu codes[V];
        for (int v = 0; v < V; ++v) {
          const vu line = four[j / kParts][v];
          codes[v] = kQuads ? (j % 2 ? line >> 4 : line) & 0x0f0f0f0fu : kOffset ? line ^ 0x80808080u : line;
        }
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t)
          for (int v = 0; v < V; ++v) add_bytes<kQuads>(sum[t][v], codes[v], x + t);
      }
    }
    for (int v = 0; v < V; ++v) {
      const vf of_group = kGrouped ? load(own_scales[b >> each] + v * W) : splat(1);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) {
        vf scale = splat(scales[t]);
        if (kGrouped) scale *= of_group;
        s.acc[t][v] = multiply_add(to_floats(sum[t][v]), scale, s.acc[t][v]);
      }
    }
    if (beside && (((b + 1) & ((1 << each) - 1)) == 0 || b + 1 == blocks))
      add_beside<T>(s, beside[b >> each], sums + (b >> each) * T);
  }
}

// What 16 rows' part of the depth gives a block of tokens.
template <int T, class Lines>
void add_part(Sixteen<T>& s, const Weight& w, const Tokens& a, const Part& p, const Lines& lines, const Panel& panel,
              const char* block) {
  const int64_t left = p.left < p.count ? p.left : p.count;
  // What is added for a group beside its products; integers that are stored with an offset have it, too.
  const bool summed = w.kind == Codes::affine4 || w.kind == Codes::affine4m ||
                      (w.kind == Codes::int8g && kOffset && a.form == Form::bytes);
  const float (*scale)[kRows] = panel.scale, (*beside)[kRows] = summed ? panel.beside : nullptr;
  const float* sums = summed ? a.sums_of(block) + p.k / w.group * T : nullptr;
  const uint32_t* x = (const uint32_t*)block + p.k * a.size() / 4 * T;
  switch (a.form) {
    case Form::bytes:
    case Form::quads: {
      const float* scales = a.scales(block) + p.k / 32 * T;
      int64_t blocks = (left + 31) / 32, each = w.group == 128 ? 2 : w.group == 64;  // 1 << each: blocks of a group
      if (a.form == Form::quads)
        add_integers<T, true, true>(s, lines, scale, each, blocks, beside, sums, x, scales);
      else if (w.group)
        add_integers<T, true, false>(s, lines, scale, each, blocks, beside, sums, x, scales);
      else
        add_integers<T, false, false>(s, lines, scale, each, blocks, beside, sums, x, scales);
      break;
    }
#if defined(__AVX512BF16__)
    case Form::pairs:
      switch (w.kind) {
        case Codes::fp8: return add_pairs<T>(s, BytePairs<Codes::fp8>(), lines, left, w.group, scale, beside, sums, x);
        case Codes::bf16: return add_pairs<T>(s, PlainPairs(), lines, left, w.group, scale, beside, sums, x);
        default: return add_pairs<T>(s, BytePairs<Codes::int8>(), lines, left, w.group, scale, beside, sums, x);
      }
    case Form::nibbles:
      return add_pairs<T>(s, NibblePairs{code_table(w)}, lines, left, w.group, scale, beside, sums, x);
#endif
    default: add_floats<T>(s, lines, left, part_depth(a.form, w.k), (const float*)x);
  }
}

// What the parts before it have given, from where it is.
template <int T>
BK_INLINE void take_sums(Sixteen<T>& s, const Part& p, int64_t count, const float* out, int64_t stride) {
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) {
      const int64_t rows = p.rows - v * W;
      const float* from = out + t * stride + v * W;
      s.acc[t][v] = !p.k || t >= count || rows <= 0 ? vf{} : rows >= W ? load(from) : load(from, rows);
    }
}

// The sums of a part, or at the last one of the whole depth.
template <int T>
BK_INLINE void put_sums(Sixteen<T>& s, const Weight& w, const Tokens& a, const Part& p, const char* block,
                        int64_t count, bool last, float* out, int64_t stride) {
  if (last && a.form == Form::bytes && w.kind == Codes::int8 && kOffset)
    for (int t = 0; t < T; ++t)
      for (int v = 0; v < V; ++v) s.acc[t][v] -= splat(kOffset * a.sums_of(block)[t]);
  // Codes with a scale a row, where it is not in the panel.
  const bool scaled =
      last && (w.kind == Codes::int8 || w.kind == Codes::fp8) && a.form != Form::floats && a.form != Form::rounded;
  for (int v = 0; v < V; ++v) {
    const int64_t rows = p.rows - v * W;
    if (rows <= 0) break;
    vf scale = splat(1);
    if (scaled) {
      const float* from = (const float*)w.scale + p.n + v * W;
      scale = rows >= W ? load(from) : load(from, rows);
    }
    for (int64_t t = 0; t < count; ++t) {
      float* to = out + t * stride + v * W;
      vf y = s.acc[t][v];
      if (scaled) y *= scale;
      rows >= W ? store(to, y) : store(to, y, rows);
    }
  }
}

// Whether lines are read from the rows as they are stored.
BK_INLINE bool read_in_place(const Weight& w, const Tokens& a) {
  if (W < 16 || w.transposed) return false;
  return a.integer() || a.form == Form::nibbles || a.form == Form::pairs || w.kind == Codes::f32;
}

// The part from k on that is made into a panel.
BK_INLINE Part panel_part(const Weight& w, const Tokens& a, int64_t n, int64_t end, int64_t k, int64_t ahead) {
  const int64_t depth = part_depth(a.form, w.k);
  Part p;
  p.n = n, p.rows = end - n < kRows ? end - n : kRows;
  p.k = k, p.left = w.k - k, p.count = p.left < depth ? (p.left + 31) / 32 * 32 : depth;
  p.next = w.codes + (p.left > depth ? n : n + ahead) * w.code_row + code_bytes(w.kind, p.left > depth ? k + depth : 0);
  return p;
}

// One block of tokens: sums stay at hand for the whole depth.
template <int T>
void panels_of_few(const Weight& w, const Tokens& a, const void* ready, int64_t begin, int64_t end, float* out,
                   int64_t stride, Panel& panel) {
  const char* block = a.block(ready, 0);
  for (int64_t n = begin; n < end; n += kRows) {
    Sixteen<T> s;
    for (int t = 0; t < T; ++t)
      for (int v = 0; v < V; ++v) s.acc[t][v] = vf{};
    Part p;
    for (int64_t k = 0; k < w.k; k += p.count) {
      p = panel_part(w, a, n, end, k, kRows);
#if defined(__AVX512F__)
      if (read_in_place(w, a) && p.rows == kRows) {
        // Whole blocks of 32; and whole groups, where a part follows.
        const int64_t most = w.group ? kGroups * w.group : p.left, unit = w.group ? w.group : 32;
        const int64_t count = p.left > most ? most : p.left % 32 ? p.left / unit * unit : p.left;
        if (count > 0) {
          p.count = count;
          p.next = w.codes + (count < p.left ? n : n + kRows) * w.code_row +
                   code_bytes(w.kind, count < p.left ? k + count : 0);
          if (w.group) make_scales(w, p, panel);
          RowLines lines(w, p, code_bytes(w.kind, count), panel.line);
          add_part<T>(s, w, a, p, lines, panel, block);
          continue;
        }
      }
#endif
      make_panel(w, p, a.form, panel);
      add_part<T>(s, w, a, p, PanelLines{panel.line}, panel, block);
    }
    put_sums<T>(s, w, a, p, block, a.m, true, out + n - begin, stride);
  }
}

template <int T>
void panels_of(const Weight& w, const Tokens& a, const void* ready, int64_t begin, int64_t end, float* out,
               int64_t stride, Panel* panels) {
  if (a.blocks == 1) return panels_of_few<T>(w, a, ready, begin, end, out, stride, *panels);
  const int64_t depth = part_depth(a.form, w.k);
  for (int64_t n = begin; n < end; n += kPanels * kRows)
    for (int64_t k = 0; k < w.k; k += depth) {
      Part parts[kPanels];
      int64_t count = 0;
      for (; count < kPanels && n + count * kRows < end; ++count) {
        parts[count] = panel_part(w, a, n + count * kRows, end, k, kPanels * kRows);
        make_panel(w, parts[count], a.form, panels[count]);
      }
      for (int64_t b = 0; b < a.blocks; ++b) {
        const int64_t first = b * T, tokens = a.m - first < T ? a.m - first : T;
        for (int64_t i = 0; i < count; ++i) {
          float* to = out + first * stride + parts[i].n - begin;
          Sixteen<T> s;
          take_sums<T>(s, parts[i], tokens, to, stride);
          add_part<T>(s, w, a, parts[i], PanelLines{panels[i].line}, panels[i], a.block(ready, b));
          put_sums<T>(s, w, a, parts[i], a.block(ready, b), tokens, w.k - k <= depth, to, stride);
        }
      }
    }
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
