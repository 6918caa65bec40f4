// Cross entropy of logits that are made and used a block at a time, 32 tokens by 32 of the vocabulary.
//
// Forward, over tokens: the logits of a chunk of the tokens and a block of the vocabulary become e = exp(z - shift),
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

  // Everything is in blocks of 32 by 32, operands in the format F of the GEMM micro-kernel, sums in float32. A chunk is
  // args.chunk tokens, in row blocks of 32; the vocabulary comes in blocks of kLossVocabulary = 32 kWide classes.
  // Indices: s of a row block of tokens, j of 32 classes in a block of the vocabulary, i of 32 features, r of a row in
  // a row block.
  const LinearCrossEntropy& args;
  const Linear& head;  // the weight (V, K) as it is stored, x (T, K), the bias (V,)
  int64_t depth;       // blocks of the features: K / 32, rounded up

  explicit Loss(const LinearCrossEntropy& given) : args(given), head(given.head), depth(blocks(given.head.k)) {}

  IndexedRows<T> tokens() const { return {(const T*)head.in.data, head.in.stride, args.tokens, args.row}; }
  int64_t most_row_blocks() const { return blocks(least(args.chunk, args.tokens)); }

  // A block of the vocabulary: its first class, how many there are, and how many blocks of 32 these take.
  struct Block {
    int64_t column, count, wide;
  };
  Block block_at(int64_t column) const {
    int64_t count = least(kLossVocabulary, args.vocabulary - column);
    return {column, count, blocks(count)};
  }
  // e of row block s and block j of the vocabulary, where the gradient of the weight will be; the next row block's
  // follows.
  E* saved(const Block& b, int64_t j, int64_t s) const {
    char* rows = (char*)args.dw + b.column * head.k * size_of(args.dw_type);
    return (E*)rows + (j * args.saved + s) * F::kBlock;
  }
  bool has_room(const Block& b, int64_t chunk) const {
    int64_t end = least((chunk + 1) * args.chunk, args.tokens);
    return args.dw && b.count == kLossVocabulary && blocks(end) <= args.saved;
  }

  // The products of a chunk of the tokens with a block of the weight, as blocks (j, s), and the block itself as a right
  // operand whose depth is the vocabulary, as blocks (i, j), unless `untransposed` is null.
  struct Chunk {
    int64_t first, end, row_blocks;  // tokens [first, end)
    E* left;                         // the tokens as left operands: (row blocks, depth) blocks, placed by `left_at`
    float* logits;  // (kWide, row blocks) blocks of 32 tokens by 32 classes; later e's argument, z - shift
    E* right;       // 32 classes of the weight as right operands: kDeep blocks
    T* decoded;     // the same before that: (32, kDepth)

    Chunk(const Loss& loss, Workspace& memory) {
      int64_t most = loss.most_row_blocks();
      left = memory.take<E>(most * loss.depth * F::kBlock);
      logits = memory.take<float>(most * kWide * kArea);
      right = memory.take<E>(kDeep * F::kBlock);
      decoded = memory.take<T>(kSide * kDepth);
    }
    float* row(int64_t j, int64_t s, int64_t r) const { return logits + (j * row_blocks + s) * kArea + r * kSide; }
  };

  void stage(Chunk& p, int64_t chunk) const {
    p.first = chunk * args.chunk, p.end = least(p.first + args.chunk, args.tokens),
    p.row_blocks = blocks(p.end - p.first);
    IndexedRows<T> rows = tokens();
    rows.count = p.end;
    for (int64_t s = 0; s < p.row_blocks; ++s)
      for (int64_t i = 0; i < depth; ++i)
        F::template stage<T>(p.left + left_at<F>(s, i, p.row_blocks, depth), rows, p.first + s * kSide, i * kSide,
                             head.k);
  }

  void products(const Chunk& p, const Block& b, E* untransposed) const {
    WeightPart<T> part;
    for (int64_t d = 0; d < depth; d += kDeep) {
      int64_t deep = least(depth - d, kDeep), elements = least(head.k - d * kSide, kDepth);
      for (int64_t j = 0; j < b.wide; ++j) {
        int64_t row = b.column + j * kSide;
        part.decode(head, row, kSide, d * kSide, deep * kSide, p.decoded);
        for (int64_t i = 0; i < deep; ++i) {
          part.put(head, false, row, (d + i) * kSide, p.right + i * F::kBlock);
          if (untransposed)
            part.put(head, true, row, (d + i) * kSide, untransposed + ((d + i) * kWide + j) * F::kBlock);
        }
        for (int64_t s = 0; s < p.row_blocks; ++s) {
          ask_for(b, j + 1 < b.wide ? d : d + kDeep, j + 1 < b.wide ? j + 1 : 0, s, p.row_blocks);
          F::multiply(p.row(j, s, 0), kSide, p.left + left_at<F>(s, d, p.row_blocks, depth), p.right, elements,
                      p.end - p.first - s * kSide, b.count - j * kSide, d > 0);
        }
      }
    }
  }

  // Part s of what is needed next of the weight: its rows are pages apart, where no prefetcher of the machine's looks.
  void ask_for(const Block& b, int64_t d, int64_t j, int64_t s, int64_t parts) const {
    if (d >= depth) d = 0, j += b.wide;  // the next block of the vocabulary
    int64_t row = b.column + j * kSide, rows = least(head.n - row, kSide);
    int64_t bytes = code_bytes(head.kind, least(depth - d, kDeep) * kSide);
    const uint8_t* first = head.codes + code_bytes(head.kind, d * kSide);
    for (int64_t r = rows * s / parts; r < rows * (s + 1) / parts; ++r)
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + (row + r) * head.code_row + i, 0, 2);
  }

  // A row of logits from its products, in place.
  struct Row {
    float largest;   // logit but for the target's
    float target;    // logit; set where the target is in this block
    float weighted;  // sum of the logits by class weight, for label smoothing
  };
  template <bool kCap>
  Row finish_row(const Chunk& p, const Block& b, int64_t s, int64_t r, bool smooth) const {
    vf largest = splat(-__builtin_inff()), weighted = {};
    for (int64_t j = 0; j < b.wide; ++j) {
      float* z = p.row(j, s, r);
      for (int64_t i = 0; i < kSide; i += W) {
        int64_t at = j * kSide + i, count = b.count - at;
        vf x = count > 0 ? load(z + i) : vf{};
        if (head.bias && count > 0)
          x += count >= W ? load(head.bias + b.column + at) : load(head.bias + b.column + at, count);
        x *= args.logit_scale;
        if (kCap) x = capped(x, args.softcap);
        if (smooth && count > 0) {
          vf c = splat(1.0f);
          if (args.weight)
            c = count >= W ? load(args.weight + b.column + at) : load(args.weight + b.column + at, count);
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
  Row finish_row(const Chunk& p, const Block& b, int64_t s, int64_t r, int64_t target, bool smooth) const {
    Row row;
    if (args.softcap > 0) {
      row = finish_row<true>(p, b, s, r, smooth);
    } else if (head.bias || args.logit_scale != 1.0f || smooth || b.count < kLossVocabulary) {
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

  // e of rows r and r + 16 of a row block as operands, times the slope of the softcap; their sums are added to `sums`.
  template <bool kCap>
  void exponentials(const Chunk& p, const Block& b, int64_t s, int r, const float* shift, double* sums, E* left,
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
          if (kCap) y *= 1.0f - vmin(splat(1.0f), (x * (1.0f / args.softcap)) * (x * (1.0f / args.softcap)));
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
  void exponentials(const Chunk& p, const Block& b, int64_t s, const float* shift, double* sums, E* left,
                    E* const* right) const {
    for (int r = 0; r < 16; ++r)
      if (args.softcap > 0)
        exponentials<true>(p, b, s, r, shift + s * kSide + r, sums ? sums + s * kSide + r : nullptr, left, right);
      else
        exponentials<false>(p, b, s, r, shift + s * kSide + r, sums ? sums + s * kSide + r : nullptr, left, right);
  }

  // ---- forward ------------------------------------------------------------------------------------------------------

  struct Forward {
    Workspace memory;
    Chunk chunk;
    E* untransposed;  // the block of the weight with the vocabulary as depth: (depth, kWide) blocks; null without dx
    E* exps;          // e as left operands, (row blocks, kWide) blocks; null without dx
    float* out;       // sums of e times the weight, (depth, row blocks) blocks of 32 by 32 floats; null without dx
    // One value a token of the chunk, (row blocks * 32,):
    float* targets;    // the target's logit
    float* shift;      // what is subtracted before the exponential
    double* sums;      // of e: thousands of blocks are added up, most of them far below the largest
    double* weighted;  // of the logits by class weight
    float* best;       // the largest logit so far, where it is asked for; NaN once one was met
    T* row;            // the target's row of the weight, decoded: (depth * 32,)
    Forward(const Loss& loss, void* workspace) : memory{(char*)workspace}, chunk(loss, memory) {
      int64_t row_blocks = loss.most_row_blocks();
      bool dx = loss.args.dx;
      untransposed = dx ? memory.take<E>(loss.depth * kWide * F::kBlock) : nullptr;
      exps = dx ? memory.take<E>(row_blocks * kWide * F::kBlock) : nullptr;
      out = dx ? memory.take<float>(loss.depth * row_blocks * kArea) : nullptr;
      sums = memory.take<double>(row_blocks * kSide);
      weighted = memory.take<double>(row_blocks * kSide);
      targets = memory.take<float>(row_blocks * kSide);
      shift = memory.take<float>(row_blocks * kSide);
      best = loss.args.predicted ? memory.take<float>(row_blocks * kSide) : nullptr;
      row = memory.take<T>(loss.depth * kSide);
    }
  };

  void forward(int64_t chunk, void* workspace) const {
    Forward m(*this, workspace);
    Chunk& p = m.chunk;
    F::begin();
    stage(p, chunk);
    int64_t count = p.end - p.first;
    bool keep = true, smooth = args.label_smoothing > 0;
    for (int64_t i = 0; i < p.row_blocks * kSide; ++i) m.sums[i] = m.weighted[i] = m.targets[i] = m.shift[i] = 0;
    for (int64_t i = 0; i < count && m.best; ++i) m.best[i] = -__builtin_inff(), args.predicted[p.first + i] = 0;
    for (int64_t column = 0; column < args.vocabulary; column += kLossVocabulary) {
      Block b = block_at(column);
      products(p, b, m.untransposed);
      bool room = has_room(b, chunk);
      for (int64_t s = 0; s < p.row_blocks; ++s) {
        for (int64_t r = 0; r < kSide && s * kSide + r < count; ++r) {
          int64_t i = s * kSide + r, y = args.target[p.first + i];
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
        exponentials(p, b, s, m.shift, m.sums, args.dx ? m.exps + s * kWide * F::kBlock : nullptr,
                     room ? right : nullptr);
        if (m.best && has_odd(m, s))
          for (int64_t r = 0; r < kSide && s * kSide + r < count; ++r) find_nan(m, b, s, r);
      }
      for (int64_t i = 0; i < depth && args.dx; ++i)
        for (int64_t s = 0; s < p.row_blocks; ++s)
          F::multiply(m.out + (i * p.row_blocks + s) * kArea, kSide, m.exps + s * kWide * F::kBlock,
                      m.untransposed + i * kWide * F::kBlock, b.wide * kSide, count - s * kSide, head.k - i * kSide,
                      column > 0);
    }
    F::end();
    if (args.kept) args.kept[chunk] = keep;
    for (int64_t i = 0; i < count; ++i) finish_token(m, i);
  }

  // The class of a block's largest logit, the largest so far. That of the target is not in its place any more.
  void find_largest(Forward& m, const Block& b, int64_t s, int64_t r, int64_t y, const Row& row) const {
    int64_t i = s * kSide + r;
    m.best[i] = row.largest;
    for (int64_t j = 0; j < b.wide; ++j) {
      const float* z = m.chunk.row(j, s, r);
      int64_t at = y - b.column - j * kSide;
      bool has_target = at >= 0 && at < kSide && row.target == row.largest;
      vf most = load(z);
      for (int64_t v = W; v < kSide; v += W) most = vmax(load(z + v), most);
      if (!has_target && max(most) < row.largest) continue;
      for (int64_t l = 0; l < kSide; ++l)
        if (z[l] == row.largest || (has_target && l == at)) {
          args.predicted[m.chunk.first + i] = b.column + j * kSide + l;
          return;
        }
    }
  }
  // Whether a row block's sums or targets may hold what is not a number.
  bool has_odd(const Forward& m, int64_t s) const {
    double zero = 0;
    for (int64_t i = s * kSide; i < (s + 1) * kSide; ++i) zero += m.sums[i] * 0 + m.targets[i] * 0;
    return zero != 0;
  }
  // The first logit of a row that is not a number, which its sum has told of, or its target's.
  void find_nan(Forward& m, const Block& b, int64_t s, int64_t r) const {
    int64_t i = s * kSide + r, y = args.target[m.chunk.first + i] - b.column;
    bool has_target = y >= 0 && y < b.count && m.targets[i] != m.targets[i];
    if (m.best[i] != m.best[i] || (m.sums[i] == m.sums[i] && !has_target)) return;
    for (int64_t c = 0; c < b.count; ++c) {
      float z = m.chunk.row(c / kSide, s, r)[c % kSide];
      if (z == z && !(has_target && c == y)) continue;
      m.best[i] = __builtin_nanf(""), args.predicted[m.chunk.first + i] = b.column + c;
      return;
    }
  }

  // The shift of a row that met a logit far above it, and what was made with the old one.
  void follow(Forward& m, int64_t s, int64_t r, float shift) const {
    int64_t i = s * kSide + r;
    float factor = vexp(splat(m.shift[i] - shift))[0];
    m.shift[i] = shift;
    m.sums[i] *= factor;
    for (int64_t k = 0; k < depth && args.dx; ++k) {
      float* out = m.out + (k * m.chunk.row_blocks + s) * kArea + r * kSide;
      for (int64_t v = 0; v < kSide; v += W) store(out + v, load(out + v) * factor);
    }
  }

  void finish_token(const Forward& m, int64_t i) const {
    const Chunk& p = m.chunk;
    int64_t t = p.first + i, y = args.target[t];
    float shift = m.shift[i], z = m.targets[i];
    float others = (float)m.sums[i], own = vexp(splat(z - shift))[0], all = others + own;
    float nll = own > others ? __builtin_log1pf(others / own) : __builtin_logf(all) - (z - shift);
    float lse = shift + __builtin_logf(all);
    TokenTerms terms =
        token_terms(args, nll, others / all, lse, args.weight ? args.weight[y] : 1.0f, (float)m.weighted[i]);
    float slope = args.softcap > 0 ? 1.0f - (z / args.softcap) * (z / args.softcap) : 1.0f;
    args.loss[t] = terms.loss, args.lse[t] = lse;
    if (!args.shift) return;
    args.shift[t] = shift, args.coefficient[t] = terms.alpha / all, args.pull[t] = terms.pulled * slope,
    args.beta[t] = terms.beta;
    if (!args.dx) return;
    decode_row(head, y, 0, depth * kSide, m.row);
    T* to = (T*)args.dx + args.row[t] * head.k;
    int64_t s = i / kSide, r = i % kSide;
    auto gradient = [&](int64_t k) __attribute__((always_inline)) {
      const float* out = m.out + (k / kSide * p.row_blocks + s) * kArea + r * kSide + k % kSide;
      int64_t count = head.k - k;
      vf g = load(out) * args.coefficient[t] + load(m.row + k) * args.pull[t];
      if (args.smoothed) g -= (count >= W ? load(args.smoothed + k) : load(args.smoothed + k, count)) * args.beta[t];
      g *= args.logit_scale;
      for (int l = 0; l < W && count < W; ++l) g[l] = l < count ? g[l] : 0.0f;
      return g;
    };
    // The gradient from above may be what lifts it into the range of float16, and comes later.
    float unit = 1.0f;
    if (Half<T>::value) {
      vf largest = {};
      for (int64_t k = 0; k < head.k; k += W) largest = vmax(vabs(gradient(k)), largest);
      float most = max(largest);
      uint32_t bits = read<uint32_t>(&most) & 0x7f800000u;
      // To [1, 2), by a number that is none of the ends of the range.
      if (bits > 0x04000000u && bits < 0x7a000000u) bits = 0x7f000000u - bits, unit = read<float>(&bits);
    }
    args.unit[t] = unit;
    for (int64_t k = 0; k < head.k; k += W) {
      vf g = gradient(k) * unit;
      head.k - k >= W ? store(to + k, g) : store(to + k, g, head.k - k);
    }
  }

  // ---- backward -----------------------------------------------------------------------------------------------------

  // The features whose gradient is wanted, and one more for the bias: its column of "tokens" holds their factors.
  int64_t features() const { return (args.dw ? head.k : 0) + (args.dbias ? 1 : 0); }

  void transpose_tokens(int64_t begin, int64_t end, E* transposed) const {
    int64_t n = features(), wide = blocks(n), row_blocks = blocks(args.tokens);
    IndexedRows<T> rows = tokens();
    alignas(64) S scaled[kSide * kSide];
    alignas(64) E staged[F::kBlock];
    for (int64_t s = begin; s < end; ++s)
      for (int64_t i = 0; i < wide; ++i) {
        for (int64_t r = 0; r < kSide; ++r) {
          int64_t t = s * kSide + r;
          const T* from = rows.get(rows, t);
          float factor = from ? args.factor[t] * args.coefficient[t] / args.top : 0.0f;
          for (int64_t v = 0; v < kSide; v += W) {
            int64_t k = i * kSide + v, count = (args.dw ? head.k : 0) - k;
            vf x = {};
            if (from && count >= W)
              x = load(from + k) * factor;
            else if (from && count > 0)
              x = load(from + k, count) * factor;
            if (args.dbias && count >= 0 && count < W) x[count] = factor;
            store(scaled + r * kSide + v, x);
          }
        }
        F::template stage<S>(staged, StridedRows<S>{scaled, kSide, kSide}, 0, 0, kSide);
        F::left_transposed(transposed + (i * row_blocks + s) * F::kBlock, staged);
      }
  }

  struct Backward {
    Workspace memory;
    Chunk chunk;
    E* exps;      // e of a chunk as right operands, made again: (kWide, row blocks) blocks
    float* sums;  // the gradient of the block of the weight, transposed: (features, kWide) blocks of 32 by 32 floats
    float* rows;  // 32 rows of it: (32, features rounded up to blocks)
    Backward(const Loss& loss, void* workspace) : memory{(char*)workspace}, chunk(loss, memory) {
      int64_t wide = blocks(loss.features());
      exps = memory.take<E>(loss.most_row_blocks() * kWide * F::kBlock);
      sums = memory.take<float>(wide * kWide * kArea);
      rows = memory.take<float>(kSide * wide * kSide);
    }
  };

  void weight(int64_t block, void* workspace) const {
    Backward m(*this, workspace);
    Block b = block_at(block * kLossVocabulary);
    int64_t n = features(), wide = blocks(n), all = blocks(args.tokens);
    const E* transposed = (const E*)args.transposed;
    F::begin();
    for (int64_t chunk = 0; chunk * args.chunk < args.tokens; ++chunk) {
      int64_t first = chunk * args.chunk / kSide,
              row_blocks = blocks(least(args.tokens, (chunk + 1) * args.chunk)) - first;
      const E* e[kWide];
      if (has_room(b, chunk) && args.kept[chunk]) {
        for (int64_t j = 0; j < b.wide; ++j) e[j] = saved(b, j, first);
      } else {
        recompute(m, b, chunk);
        for (int64_t j = 0; j < b.wide; ++j) e[j] = m.exps + j * row_blocks * F::kBlock;
      }
      for (int64_t j = 0; j < b.wide; ++j)
        for (int64_t i = 0; i < wide; ++i)
          F::multiply(m.sums + (i * kWide + j) * kArea, kSide, transposed + (i * all + first) * F::kBlock, e[j],
                      row_blocks * kSide, n - i * kSide, kSide, chunk > 0);
    }
    F::end();
    for (int64_t j = 0; j < b.wide; ++j) put_rows(m, b, block, j);
  }

  // e of a chunk, once more.
  void recompute(Backward& m, const Block& b, int64_t chunk) const {
    Chunk& p = m.chunk;
    stage(p, chunk);
    products(p, b, nullptr);
    for (int64_t s = 0; s < p.row_blocks; ++s) {
      for (int64_t r = 0; r < kSide && p.first + s * kSide + r < p.end; ++r)
        finish_row(p, b, s, r, args.target[p.first + s * kSide + r], false);
      E* right[kWide];
      for (int64_t j = 0; j < b.wide; ++j) right[j] = m.exps + (j * p.row_blocks + s) * F::kBlock;
      exponentials(p, b, s, args.shift + p.first, nullptr, nullptr, right);
    }
  }

  // 32 rows of the gradient of the weight, and of the bias.
  void put_rows(const Backward& m, const Block& b, int64_t block, int64_t j) const {
    int64_t width = blocks(features()) * kSide;
    for (int64_t i = 0; i < width; i += 16)
      for (int64_t c = 0; c < kSide; c += 16)
        transpose16(m.sums + (i / kSide * kWide + j) * kArea + i % kSide * kSide + c, kSide * 4, m.rows + c * width + i,
                    width * 4);
    int64_t at = args.first[block];
    while (at < args.first[block + 1] && args.target[args.sorted[at]] < b.column + j * kSide) ++at;
    for (int64_t r = 0; r < kSide && j * kSide + r < b.count; ++r) {
      int64_t v = b.column + j * kSide + r;
      float* row = m.rows + r * width;
      float pulled = 0;
      for (int64_t k = 0; k < width; k += W) store(row + k, load(row + k) * args.top);
      for (; at < args.first[block + 1] && args.target[args.sorted[at]] == v; ++at) {
        int64_t t = args.sorted[at];
        pulled += add_token(row, args.factor[t] * args.pull[t], (const T*)head.in.data + args.row[t] * head.in.stride);
      }
      float smooth = args.beta_x ? (args.weight ? args.weight[v] : 1.0f) : 0.0f;
      if (args.dbias) args.dbias[v] = row[args.dw ? head.k : 0] + pulled - smooth * args.beta_sum;
      if (!args.dw) continue;
      if (args.dw_type == Type::f32) {
        put_row(row, smooth, (float*)args.dw + v * head.k);
      } else {
        put_row(row, smooth, (T*)args.dw + v * head.k);
      }
    }
  }
  float add_token(float* row, float factor, const T* x) const {
    for (int64_t k = 0; k < head.k && args.dw; k += W) {
      vf from = head.k - k >= W ? load(x + k) : load(x + k, head.k - k);
      // The column of the bias is behind the features, within the last vector.
      if (head.k - k >= W)
        store(row + k, load(row + k) + from * factor);
      else
        store(row + k, load(row + k) + from * factor, head.k - k);
    }
    return factor;
  }
  template <class To>
  void put_row(const float* row, float smooth, To* to) const {
    for (int64_t k = 0; k < head.k; k += W) {
      int64_t count = head.k - k;
      vf g = load(row + k);
      if (args.beta_x) g -= (count >= W ? load(args.beta_x + k) : load(args.beta_x + k, count)) * smooth;
      count >= W ? store(to + k, g) : store(to + k, g, count);
    }
  }

  void scale(int64_t begin, int64_t end) const {
    for (int64_t t = begin; t < end; ++t) {
      T* row = (T*)args.dx + args.row[t] * head.k;
      for (int64_t k = 0; k < head.k; k += W) {
        int64_t count = head.k - k;
        if (count >= W)
          store(row + k, load(row + k) * (args.factor[t] / args.unit[t]));
        else
          store(row + k, load(row + k, count) * (args.factor[t] / args.unit[t]), count);
      }
    }
  }

  int64_t forward_size() const { return (char*)Forward(*this, nullptr).memory.next - (char*)nullptr; }
  int64_t backward_size() const { return (char*)Backward(*this, nullptr).memory.next - (char*)nullptr; }
  static int64_t block_size() { return F::kBlock * sizeof(E); }
  int64_t transposed_row_block_bytes() const { return blocks(features()) * F::kBlock * (int64_t)sizeof(E); }
};

template <class Run>
BK_INLINE auto with_loss(const LinearCrossEntropy& a, Run run) {
  return by_type(a.head.type, [&](auto t) { return run(Loss<decltype(t)>(a)); });
}

}  // namespace

void linear_loss_tokens(const LinearCrossEntropy& a, int64_t chunk, void* workspace) {
  with_loss(a, [&](const auto& loss) { loss.forward(chunk, workspace); });
}
void linear_loss_transpose(const LinearCrossEntropy& a, int64_t begin, int64_t end, void* transposed) {
  with_loss(a,
            [&](const auto& loss) { loss.transpose_tokens(begin, end, (decltype(loss.saved({}, 0, 0)))transposed); });
}
void linear_loss_weight(const LinearCrossEntropy& a, int64_t block, void* workspace) {
  with_loss(a, [&](const auto& loss) { loss.weight(block, workspace); });
}
void linear_loss_scale(const LinearCrossEntropy& a, int64_t begin, int64_t end) {
  with_loss(a, [&](const auto& loss) { loss.scale(begin, end); });
}
int64_t linear_loss_tokens_size(const LinearCrossEntropy& a) {
  return with_loss(a, [](const auto& loss) { return loss.forward_size(); });
}
int64_t linear_loss_row_block_bytes(const LinearCrossEntropy& a) {
  return with_loss(a, [](const auto& loss) { return loss.transposed_row_block_bytes(); });
}
int64_t linear_loss_weight_size(const LinearCrossEntropy& a) {
  return with_loss(a, [](const auto& loss) { return loss.backward_size(); });
}
int64_t linear_loss_block(const LinearCrossEntropy& a) {
  return with_loss(a, [](const auto& loss) { return loss.block_size(); });
}

}  // namespace BK_ISA
}  // namespace bigkernels
