// Cross entropy of logits that are made and used a block at a time, 32 tokens by 32 of the vocabulary.
//
// Forward, over tokens: the logits of a piece of the tokens and a block of the vocabulary become e = exp(z - shift),
// which are summed for the loss and multiplied with the block of the weight at once, as attention does with its values:
// the gradient of x needs no second look at the logits. Backward, over the vocabulary: e^T times the tokens, added up
// in float32. Its e come from forward as far as the gradient's own memory has room for them, which is all of them where
// there are no more tokens than features; the others are made again.
//
// The target's own e stays out of all products and sums: for a confident token its gradient, 1 - p, is the sum of the
// others, and would be lost in a rounded 1.
#include "token_terms.h"
#include "weight_blocks.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

constexpr int64_t kWide = kLossVocabulary / kSide;
constexpr int64_t kArea = kSide * kSide;
// e may grow to exp(kMuch) before its shift follows the largest logit.
constexpr float kMuch = 60.0f;

template <class T>
struct IndexedRows {
  const T* first;
  int64_t stride, count;
  const int64_t* index;
  BK_INLINE const T* get(const IndexedRows& s, int64_t r) {
    return r < s.count ? s.first + s.index[r] * s.stride : nullptr;
  }
};

// What a format stages rows of scaled tokens from: float32 where it can round by itself.
template <class F>
struct Scaled {
  typedef float type;
};
#if defined(__AVX512BF16__)
template <>
struct Scaled<Pairs<1>> {
  typedef bf16 type;
};
#endif

template <class T>
struct Half {
  static constexpr bool value = false;
};
template <>
struct Half<f16> {
  static constexpr bool value = true;
};

BK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
struct Loss {
  typedef typename FormatOf<T>::type F;
  typedef typename F::Element E;
  typedef typename Scaled<F>::type S;

  const LinearCrossEntropy& a;
  const Linear& w;
  int64_t depth;  // blocks of the features

  explicit Loss(const LinearCrossEntropy& args) : a(args), w(args.head), depth(blocks(args.head.k)) {}

  IndexedRows<T> tokens() const { return {(const T*)w.in.data, w.in.stride, a.tokens, a.row}; }
  int64_t most_strips() const { return blocks(least(a.piece, a.tokens)); }

  // A block of the vocabulary.
  struct Block {
    int64_t column, count, wide;
  };
  Block block_at(int64_t column) const {
    int64_t count = least(kLossVocabulary, a.vocabulary - column);
    return {column, count, blocks(count)};
  }
  // e of strip s and block j of the vocabulary, where the gradient of the weight will be; the next strip's follows.
  E* saved(const Block& b, int64_t j, int64_t s) const {
    char* rows = (char*)a.dw + b.column * w.k * size_of(a.dw_type);
    return (E*)rows + (j * a.saved + s) * F::kBlock;
  }
  bool has_room(const Block& b, int64_t piece) const {
    int64_t end = least((piece + 1) * a.piece, a.tokens);
    return a.dw && b.count == kLossVocabulary && blocks(end) <= a.saved;
  }

  // The products of a piece of the tokens with a block of the weight, as blocks (j, s), and the block itself as a right
  // operand whose depth is the vocabulary, as blocks (i, j), unless `straight` is null.
  struct Piece {
    int64_t first, end, strips;  // tokens
    E* left;
    float* z;
    E* right;
    T* decoded;

    Piece(const Loss& l, Workspace& memory) {
      int64_t most = l.most_strips();
      left = memory.take<E>(most * l.depth * F::kBlock);
      z = memory.take<float>(most * kWide * kArea);
      right = memory.take<E>(kDeep * F::kBlock);
      decoded = memory.take<T>(kSide * kDepth);
    }
    float* row(int64_t j, int64_t s, int64_t r) const { return z + (j * strips + s) * kArea + r * kSide; }
  };

  void stage(Piece& p, int64_t piece) const {
    p.first = piece * a.piece, p.end = least(p.first + a.piece, a.tokens), p.strips = blocks(p.end - p.first);
    IndexedRows<T> rows = tokens();
    rows.count = p.end;
    for (int64_t s = 0; s < p.strips; ++s)
      for (int64_t i = 0; i < depth; ++i)
        F::template stage<T>(p.left + left_at<F>(s, i, p.strips, depth), rows, p.first + s * kSide, i * kSide, w.k);
  }

  void products(const Piece& p, const Block& b, E* straight) const {
    WeightPart<T> part;
    for (int64_t d = 0; d < depth; d += kDeep) {
      int64_t deep = least(depth - d, kDeep), elements = least(w.k - d * kSide, kDepth);
      for (int64_t j = 0; j < b.wide; ++j) {
        int64_t row = b.column + j * kSide;
        part.decode(w, row, kSide, d * kSide, deep * kSide, p.decoded);
        for (int64_t i = 0; i < deep; ++i) {
          part.put(w, false, row, (d + i) * kSide, p.right + i * F::kBlock);
          if (straight) part.put(w, true, row, (d + i) * kSide, straight + ((d + i) * kWide + j) * F::kBlock);
        }
        for (int64_t s = 0; s < p.strips; ++s) {
          ask_for(b, j + 1 < b.wide ? d : d + kDeep, j + 1 < b.wide ? j + 1 : 0, s, p.strips);
          F::multiply(p.row(j, s, 0), kSide, p.left + left_at<F>(s, d, p.strips, depth), p.right, elements,
                      p.end - p.first - s * kSide, b.count - j * kSide, d > 0);
        }
      }
    }
  }

  // Part s of what is needed next of the weight: its rows are pages apart, where no prefetcher of the machine's looks.
  void ask_for(const Block& b, int64_t d, int64_t j, int64_t s, int64_t parts) const {
    if (d >= depth) d = 0, j += b.wide;  // the next block of the vocabulary
    int64_t row = b.column + j * kSide, rows = least(w.n - row, kSide);
    int64_t bytes = code_bytes(w.kind, least(depth - d, kDeep) * kSide);
    const uint8_t* first = w.codes + code_bytes(w.kind, d * kSide);
    for (int64_t r = rows * s / parts; r < rows * (s + 1) / parts; ++r)
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + (row + r) * w.code_row + i, 0, 2);
  }

  // A row of logits from its products, in place.
  struct Row {
    float largest, target, weighted;
  };
  template <bool kCap>
  Row finish_row(const Piece& p, const Block& b, int64_t s, int64_t r, bool smooth) const {
    vf largest = splat(-__builtin_inff()), weighted = {};
    for (int64_t j = 0; j < b.wide; ++j) {
      float* z = p.row(j, s, r);
      for (int64_t i = 0; i < kSide; i += W) {
        int64_t at = j * kSide + i, count = b.count - at;
        vf x = count > 0 ? load(z + i) : vf{};
        if (w.bias && count > 0) x += count >= W ? load(w.bias + b.column + at) : load(w.bias + b.column + at, count);
        x *= a.logit_scale;
        if (kCap) x = capped(x, a.softcap);
        if (smooth && count > 0) {
          vf c = splat(1.0f);
          if (a.weight)
            c = count >= W ? load(a.weight + b.column + at) : load(a.weight + b.column + at, count);
          else if (count < W)
            for (int l = 0; l < W; ++l) c[l] = l < count ? 1.0f : 0.0f;
          weighted += count >= W ? c * x : select(c != 0.0f, c * x, vf{});
        }
        if (count < W)
          for (int l = 0; l < W; ++l) x[l] = l < count ? x[l] : -__builtin_inff();
        largest = vmax(x, largest);
        store(z + i, x);
      }
    }
    return {max(largest), 0, sum(weighted)};
  }
  // The target's logit is returned, and left out of what is made of the row.
  Row finish_row(const Piece& p, const Block& b, int64_t s, int64_t r, int64_t target, bool smooth) const {
    Row row;
    if (a.softcap > 0) {
      row = finish_row<true>(p, b, s, r, smooth);
    } else if (w.bias || a.logit_scale != 1.0f || smooth || b.count < kLossVocabulary) {
      row = finish_row<false>(p, b, s, r, smooth);
    } else {  // the products are the logits
      vf largest[kVectors];
      for (int v = 0; v < kVectors; ++v) largest[v] = load(p.row(0, s, r) + v * W);
      for (int64_t j = 1; j < kWide; ++j)
        for (int v = 0; v < kVectors; ++v) largest[v] = vmax(load(p.row(j, s, r) + v * W), largest[v]);
      for (int v = 1; v < kVectors; ++v) largest[0] = vmax(largest[v], largest[0]);
      row = {max(largest[0]), 0, 0};
    }
    if (target >= b.column && target < b.column + b.count) {
      float* z = p.row((target - b.column) / kSide, s, r) + (target - b.column) % kSide;
      row.target = *z;
      *z = -__builtin_inff();
    }
    return row;
  }

  // e of rows r and r + 16 of a strip as operands, times the slope of the softcap; their sums are added to `sums`.
  template <bool kCap>
  void exponentials(const Piece& p, const Block& b, int64_t s, int r, const float* shift, double* sums, E* left,
                    E* const* right) const {
    int64_t at = p.first + s * kSide + r;
    vf total[2] = {};
    for (int64_t j = 0; j < b.wide; ++j) {
      vf e[2][kVectors];
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const float* z = p.row(j, s, r + 16 * half);
        if (at + 16 * half >= p.end) {
          for (int v = 0; v < kVectors; ++v) e[half][v] = vf{};
          continue;
        }
        for (int v = 0; v < kVectors; ++v) {
          vf x = load(z + v * W);
          vf y = vexp_softmax(x - shift[16 * half]);
          total[half] += y;
          // The target's z is minus infinity, and its e zero: no slope may make that NaN.
          if (kCap) y *= 1.0f - vmin(splat(1.0f), (x * (1.0f / a.softcap)) * (x * (1.0f / a.softcap)));
          e[half][v] = y;
        }
      }
      if (right) F::put_right(right[j], r, e[0], e[1]);
      if (left) {
        F::put_left(left + j * F::kBlock, r, e[0]);
        F::put_left(left + j * F::kBlock, r + 16, e[1]);
      }
    }
    if (sums)
      for (int half = 0; half < 2; ++half)
        if (at + 16 * half < p.end) sums[16 * half] += sum(total[half]);
  }
  void exponentials(const Piece& p, const Block& b, int64_t s, const float* shift, double* sums, E* left,
                    E* const* right) const {
    for (int r = 0; r < 16; ++r)
      if (a.softcap > 0)
        exponentials<true>(p, b, s, r, shift + s * kSide + r, sums ? sums + s * kSide + r : nullptr, left, right);
      else
        exponentials<false>(p, b, s, r, shift + s * kSide + r, sums ? sums + s * kSide + r : nullptr, left, right);
  }

  // ---- forward ------------------------------------------------------------------------------------------------------

  struct Forward {
    Workspace memory;
    Piece p;
    E *straight, *e;
    float *out, *targets, *shift;
    double *sums, *weighted;  // thousands of blocks are added up, most of them far below the largest
    float* best;              // the largest logit so far, where it is asked for; NaN once one was met
    T* row;
    Forward(const Loss& l, void* workspace) : memory{(char*)workspace}, p(l, memory) {
      int64_t strips = l.most_strips();
      bool dx = l.a.dx;
      straight = dx ? memory.take<E>(l.depth * kWide * F::kBlock) : nullptr;
      e = dx ? memory.take<E>(strips * kWide * F::kBlock) : nullptr;
      out = dx ? memory.take<float>(l.depth * strips * kArea) : nullptr;
      sums = memory.take<double>(strips * kSide);
      weighted = memory.take<double>(strips * kSide);
      targets = memory.take<float>(strips * kSide);
      shift = memory.take<float>(strips * kSide);
      best = l.a.predicted ? memory.take<float>(strips * kSide) : nullptr;
      row = memory.take<T>(l.depth * kSide);
    }
  };

  void forward(int64_t piece, void* workspace) const {
    Forward m(*this, workspace);
    Piece& p = m.p;
    F::begin();
    stage(p, piece);
    int64_t count = p.end - p.first;
    bool keep = true, smooth = a.label_smoothing > 0;
    for (int64_t i = 0; i < p.strips * kSide; ++i) m.sums[i] = m.weighted[i] = m.targets[i] = m.shift[i] = 0;
    for (int64_t i = 0; i < count && m.best; ++i) m.best[i] = -__builtin_inff(), a.predicted[p.first + i] = 0;
    for (int64_t column = 0; column < a.vocabulary; column += kLossVocabulary) {
      Block b = block_at(column);
      products(p, b, m.straight);
      bool room = has_room(b, piece);
      for (int64_t s = 0; s < p.strips; ++s) {
        for (int64_t r = 0; r < kSide && s * kSide + r < count; ++r) {
          int64_t i = s * kSide + r, y = a.target[p.first + i];
          Row row = finish_row(p, b, s, r, y, smooth);
          m.weighted[i] += row.weighted;
          if (y >= b.column && y < b.column + b.count) m.targets[i] = row.target;
          if (m.best && row.largest > m.best[i]) find_largest(m, b, s, r, y, row);
          if (column == 0) {
            m.shift[i] = row.largest == -__builtin_inff() ? 0 : row.largest;
          } else if (row.largest > m.shift[i] + kMuch) {
            follow(m, s, r, row.largest);
            keep = false;
          }
        }
        E* right[kWide];
        for (int64_t j = 0; j < b.wide && room; ++j) right[j] = saved(b, j, p.first / kSide + s);
        exponentials(p, b, s, m.shift, m.sums, a.dx ? m.e + s * kWide * F::kBlock : nullptr, room ? right : nullptr);
        if (m.best && has_odd(m, s))
          for (int64_t r = 0; r < kSide && s * kSide + r < count; ++r) find_nan(m, b, s, r);
      }
      for (int64_t i = 0; i < depth && a.dx; ++i)
        for (int64_t s = 0; s < p.strips; ++s)
          F::multiply(m.out + (i * p.strips + s) * kArea, kSide, m.e + s * kWide * F::kBlock,
                      m.straight + i * kWide * F::kBlock, b.wide * kSide, count - s * kSide, w.k - i * kSide,
                      column > 0);
    }
    F::end();
    if (a.kept) a.kept[piece] = keep;
    for (int64_t i = 0; i < count; ++i) finish_token(m, i);
  }

  // The class of a block's largest logit, the largest so far. That of the target is not in its place any more.
  void find_largest(Forward& m, const Block& b, int64_t s, int64_t r, int64_t y, const Row& row) const {
    int64_t i = s * kSide + r;
    m.best[i] = row.largest;
    for (int64_t j = 0; j < b.wide; ++j) {
      const float* z = m.p.row(j, s, r);
      int64_t at = y - b.column - j * kSide;
      bool has_target = at >= 0 && at < kSide && row.target == row.largest;
      vf most = load(z);
      for (int64_t v = W; v < kSide; v += W) most = vmax(load(z + v), most);
      if (!has_target && max(most) < row.largest) continue;
      for (int64_t l = 0; l < kSide; ++l)
        if (z[l] == row.largest || (has_target && l == at)) {
          a.predicted[m.p.first + i] = b.column + j * kSide + l;
          return;
        }
    }
  }
  // Whether a strip's sums or targets may hold what is not a number.
  bool has_odd(const Forward& m, int64_t s) const {
    double zero = 0;
    for (int64_t i = s * kSide; i < (s + 1) * kSide; ++i) zero += m.sums[i] * 0 + m.targets[i] * 0;
    return zero != 0;
  }
  // The first logit of a row that is not a number, which its sum has told of, or its target's.
  void find_nan(Forward& m, const Block& b, int64_t s, int64_t r) const {
    int64_t i = s * kSide + r, y = a.target[m.p.first + i] - b.column;
    bool has_target = y >= 0 && y < b.count && m.targets[i] != m.targets[i];
    if (m.best[i] != m.best[i] || (m.sums[i] == m.sums[i] && !has_target)) return;
    for (int64_t c = 0; c < b.count; ++c) {
      float z = m.p.row(c / kSide, s, r)[c % kSide];
      if (z == z && !(has_target && c == y)) continue;
      m.best[i] = __builtin_nanf(""), a.predicted[m.p.first + i] = b.column + c;
      return;
    }
  }

  // The shift of a row that met a logit far above it, and what was made with the old one.
  void follow(Forward& m, int64_t s, int64_t r, float shift) const {
    int64_t i = s * kSide + r;
    float factor = vexp(splat(m.shift[i] - shift))[0];
    m.shift[i] = shift;
    m.sums[i] *= factor;
    for (int64_t k = 0; k < depth && a.dx; ++k) {
      float* out = m.out + (k * m.p.strips + s) * kArea + r * kSide;
      for (int64_t v = 0; v < kSide; v += W) store(out + v, load(out + v) * factor);
    }
  }

  void finish_token(const Forward& m, int64_t i) const {
    const Piece& p = m.p;
    int64_t t = p.first + i, y = a.target[t];
    float shift = m.shift[i], z = m.targets[i];
    float others = (float)m.sums[i], own = vexp(splat(z - shift))[0], all = others + own;
    float nll = own > others ? __builtin_log1pf(others / own) : __builtin_logf(all) - (z - shift);
    float lse = shift + __builtin_logf(all);
    TokenTerms terms = token_terms(a, nll, others / all, lse, a.weight ? a.weight[y] : 1.0f, (float)m.weighted[i]);
    float slope = a.softcap > 0 ? 1.0f - (z / a.softcap) * (z / a.softcap) : 1.0f;
    a.loss[t] = terms.loss, a.lse[t] = lse;
    if (!a.shift) return;
    a.shift[t] = shift, a.coefficient[t] = terms.alpha / all, a.pull[t] = terms.pulled * slope, a.beta[t] = terms.beta;
    if (!a.dx) return;
    decode_row(w, y, 0, depth * kSide, m.row);
    T* to = (T*)a.dx + a.row[t] * w.k;
    int64_t s = i / kSide, r = i % kSide;
    auto gradient = [&](int64_t k) __attribute__((always_inline)) {
      const float* out = m.out + (k / kSide * p.strips + s) * kArea + r * kSide + k % kSide;
      int64_t count = w.k - k;
      vf g = load(out) * a.coefficient[t] + load(m.row + k) * a.pull[t];
      if (a.smoothed) g -= (count >= W ? load(a.smoothed + k) : load(a.smoothed + k, count)) * a.beta[t];
      g *= a.logit_scale;
      for (int l = 0; l < W && count < W; ++l) g[l] = l < count ? g[l] : 0.0f;
      return g;
    };
    // The gradient from above may be what lifts it into the range of float16, and comes later.
    float unit = 1.0f;
    if (Half<T>::value) {
      vf largest = {};
      for (int64_t k = 0; k < w.k; k += W) largest = vmax(vabs(gradient(k)), largest);
      float most = max(largest);
      uint32_t bits = read<uint32_t>(&most) & 0x7f800000u;
      // To [1, 2), by a number that is none of the ends of the range.
      if (bits > 0x04000000u && bits < 0x7a000000u) bits = 0x7f000000u - bits, unit = read<float>(&bits);
    }
    a.unit[t] = unit;
    for (int64_t k = 0; k < w.k; k += W) {
      vf g = gradient(k) * unit;
      w.k - k >= W ? store(to + k, g) : store(to + k, g, w.k - k);
    }
  }

  // ---- backward -----------------------------------------------------------------------------------------------------

  // The features whose gradient is wanted, and one more for the bias: its column of "tokens" holds their factors.
  int64_t features() const { return (a.dw ? w.k : 0) + (a.dbias ? 1 : 0); }

  void turn(int64_t begin, int64_t end, E* turned) const {
    int64_t n = features(), wide = blocks(n), strips = blocks(a.tokens);
    IndexedRows<T> rows = tokens();
    alignas(64) S scaled[kSide * kSide];
    alignas(64) E staged[F::kBlock];
    for (int64_t s = begin; s < end; ++s)
      for (int64_t i = 0; i < wide; ++i) {
        for (int64_t r = 0; r < kSide; ++r) {
          int64_t t = s * kSide + r;
          const T* from = rows.get(rows, t);
          float factor = from ? a.factor[t] * a.coefficient[t] / a.top : 0.0f;
          for (int64_t v = 0; v < kSide; v += W) {
            int64_t k = i * kSide + v, count = (a.dw ? w.k : 0) - k;
            vf x = {};
            if (from && count >= W)
              x = load(from + k) * factor;
            else if (from && count > 0)
              x = load(from + k, count) * factor;
            if (a.dbias && count >= 0 && count < W) x[count] = factor;
            store(scaled + r * kSide + v, x);
          }
        }
        F::template stage<S>(staged, StridedRows<S>{scaled, kSide, kSide}, 0, 0, kSide);
        F::left_turned(turned + (i * strips + s) * F::kBlock, staged);
      }
  }

  struct Backward {
    Workspace memory;
    Piece p;
    E* e;
    float *sums, *rows;
    Backward(const Loss& l, void* workspace) : memory{(char*)workspace}, p(l, memory) {
      int64_t wide = blocks(l.features());
      e = memory.take<E>(l.most_strips() * kWide * F::kBlock);
      sums = memory.take<float>(wide * kWide * kArea);
      rows = memory.take<float>(kSide * wide * kSide);
    }
  };

  void weight(int64_t block, void* workspace) const {
    Backward m(*this, workspace);
    Block b = block_at(block * kLossVocabulary);
    int64_t n = features(), wide = blocks(n), all = blocks(a.tokens);
    const E* turned = (const E*)a.turned;
    F::begin();
    for (int64_t piece = 0; piece * a.piece < a.tokens; ++piece) {
      int64_t first = piece * a.piece / kSide, strips = blocks(least(a.tokens, (piece + 1) * a.piece)) - first;
      const E* e[kWide];
      if (has_room(b, piece) && a.kept[piece]) {
        for (int64_t j = 0; j < b.wide; ++j) e[j] = saved(b, j, first);
      } else {
        again(m, b, piece);
        for (int64_t j = 0; j < b.wide; ++j) e[j] = m.e + j * strips * F::kBlock;
      }
      for (int64_t j = 0; j < b.wide; ++j)
        for (int64_t i = 0; i < wide; ++i)
          F::multiply(m.sums + (i * kWide + j) * kArea, kSide, turned + (i * all + first) * F::kBlock, e[j],
                      strips * kSide, n - i * kSide, kSide, piece > 0);
    }
    F::end();
    for (int64_t j = 0; j < b.wide; ++j) put_rows(m, b, block, j);
  }

  // e of a piece, once more.
  void again(Backward& m, const Block& b, int64_t piece) const {
    Piece& p = m.p;
    stage(p, piece);
    products(p, b, nullptr);
    for (int64_t s = 0; s < p.strips; ++s) {
      for (int64_t r = 0; r < kSide && p.first + s * kSide + r < p.end; ++r)
        finish_row(p, b, s, r, a.target[p.first + s * kSide + r], false);
      E* right[kWide];
      for (int64_t j = 0; j < b.wide; ++j) right[j] = m.e + (j * p.strips + s) * F::kBlock;
      exponentials(p, b, s, a.shift + p.first, nullptr, nullptr, right);
    }
  }

  // 32 rows of the gradient of the weight, and of the bias.
  void put_rows(const Backward& m, const Block& b, int64_t block, int64_t j) const {
    int64_t width = blocks(features()) * kSide;
    for (int64_t i = 0; i < width; i += 16)
      for (int64_t c = 0; c < kSide; c += 16)
        transpose16(m.sums + (i / kSide * kWide + j) * kArea + i % kSide * kSide + c, kSide * 4, m.rows + c * width + i,
                    width * 4);
    int64_t at = a.first[block];
    while (at < a.first[block + 1] && a.target[a.sorted[at]] < b.column + j * kSide) ++at;
    for (int64_t r = 0; r < kSide && j * kSide + r < b.count; ++r) {
      int64_t v = b.column + j * kSide + r;
      float* row = m.rows + r * width;
      float pulled = 0;
      for (int64_t k = 0; k < width; k += W) store(row + k, load(row + k) * a.top);
      for (; at < a.first[block + 1] && a.target[a.sorted[at]] == v; ++at) {
        int64_t t = a.sorted[at];
        pulled += add_token(row, a.factor[t] * a.pull[t], (const T*)w.in.data + a.row[t] * w.in.stride);
      }
      float smooth = a.beta_x ? (a.weight ? a.weight[v] : 1.0f) : 0.0f;
      if (a.dbias) a.dbias[v] = row[a.dw ? w.k : 0] + pulled - smooth * a.beta_sum;
      if (!a.dw) continue;
      if (a.dw_type == Type::f32) {
        put_row(row, smooth, (float*)a.dw + v * w.k);
      } else {
        put_row(row, smooth, (T*)a.dw + v * w.k);
      }
    }
  }
  float add_token(float* row, float factor, const T* x) const {
    for (int64_t k = 0; k < w.k && a.dw; k += W) {
      vf from = w.k - k >= W ? load(x + k) : load(x + k, w.k - k);
      // The column of the bias is behind the features, within the last vector.
      if (w.k - k >= W)
        store(row + k, load(row + k) + from * factor);
      else
        store(row + k, load(row + k) + from * factor, w.k - k);
    }
    return factor;
  }
  template <class To>
  void put_row(const float* row, float smooth, To* to) const {
    for (int64_t k = 0; k < w.k; k += W) {
      int64_t count = w.k - k;
      vf g = load(row + k);
      if (a.beta_x) g -= (count >= W ? load(a.beta_x + k) : load(a.beta_x + k, count)) * smooth;
      count >= W ? store(to + k, g) : store(to + k, g, count);
    }
  }

  void scale(int64_t begin, int64_t end) const {
    for (int64_t t = begin; t < end; ++t) {
      T* row = (T*)a.dx + a.row[t] * w.k;
      for (int64_t k = 0; k < w.k; k += W) {
        int64_t count = w.k - k;
        if (count >= W)
          store(row + k, load(row + k) * (a.factor[t] / a.unit[t]));
        else
          store(row + k, load(row + k, count) * (a.factor[t] / a.unit[t]), count);
      }
    }
  }

  int64_t forward_size() const { return (char*)Forward(*this, nullptr).memory.next - (char*)nullptr; }
  int64_t backward_size() const { return (char*)Backward(*this, nullptr).memory.next - (char*)nullptr; }
  static int64_t block_size() { return F::kBlock * sizeof(E); }
  int64_t turned_strip() const { return blocks(features()) * F::kBlock * (int64_t)sizeof(E); }
};

template <class Run>
BK_INLINE auto by_type(const LinearCrossEntropy& a, Run run) {
  switch (a.head.type) {
    case Type::bf16: return run(Loss<bf16>(a));
    case Type::f16: return run(Loss<f16>(a));
    default: return run(Loss<float>(a));
  }
}

}  // namespace

void linear_loss_tokens(const LinearCrossEntropy& a, int64_t piece, void* workspace) {
  by_type(a, [&](const auto& loss) { loss.forward(piece, workspace); });
}
void linear_loss_turn(const LinearCrossEntropy& a, int64_t begin, int64_t end, void* turned) {
  by_type(a, [&](const auto& loss) { loss.turn(begin, end, (decltype(loss.saved({}, 0, 0)))turned); });
}
void linear_loss_weight(const LinearCrossEntropy& a, int64_t block, void* workspace) {
  by_type(a, [&](const auto& loss) { loss.weight(block, workspace); });
}
void linear_loss_scale(const LinearCrossEntropy& a, int64_t begin, int64_t end) {
  by_type(a, [&](const auto& loss) { loss.scale(begin, end); });
}
int64_t linear_loss_tokens_size(const LinearCrossEntropy& a) {
  return by_type(a, [](const auto& loss) { return loss.forward_size(); });
}
int64_t linear_loss_turned_strip(const LinearCrossEntropy& a) {
  return by_type(a, [](const auto& loss) { return loss.turned_strip(); });
}
int64_t linear_loss_weight_size(const LinearCrossEntropy& a) {
  return by_type(a, [](const auto& loss) { return loss.backward_size(); });
}
int64_t linear_loss_block(const LinearCrossEntropy& a) {
  return by_type(a, [](const auto& loss) { return loss.block_size(); });
}

}  // namespace BK_ISA
}  // namespace bigkernels
