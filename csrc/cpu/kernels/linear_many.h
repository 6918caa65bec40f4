// Products of many tokens: 32x32 blocks of the weight, whatever it is stored as, are made into the operand of the GEMM
// micro-kernel, some hundred kilobytes at a time, forward and backward; the whole weight never exists in another form,
// unless the caller keeps it packed.
#pragma once
#include "linear_activated.h"
#include "weight_blocks.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

struct Sizes {
  int64_t depth, columns;
  Sizes(const Linear& a, bool backward) : depth(backward ? a.n : a.k), columns(backward ? a.k : a.n) {}
};

template <class T>
struct Many {
  typedef typename FormatOf<T>::type F;
  typedef typename F::Element E;

  // Row blocks [begin, end) of `in` as left operands. Where the rows of the weight are the depth, as in backward, it is
  // in the split order, in which untransposed blocks on the right come.
  static void pack_left(const Linear& a, bool backward, int64_t begin, int64_t end, E* left) {
    Sizes n(a, backward);
    int64_t row_blocks = blocks(a.m), all = blocks(n.depth);
    StridedRows<T> rows{(const T*)a.in.data, a.in.stride, a.in_transposed ? n.depth : a.m};
    alignas(64) E staged[F::kBlock];
    for (int64_t s = begin; s < end; ++s)
      for (int64_t i = 0; i < all; ++i) {
        E* to = left + left_at<F>(s, i, row_blocks, all);
        if (a.in_transposed) {
          F::template stage<T>(staged, rows, i * kSide, s * kSide, a.m);
          F::left_transposed(to, staged);
        } else if (!backward) {
          for (int r = 0; r < kSide; ++r) {  // the rows lie pages apart
            const T* row = rows.get(rows, s * kSide + r);
            if (row) prefetch(row + (i + 8) * kSide);
          }
          F::template stage<T>(to, rows, s * kSide, i * kSide, n.depth);
        } else {
          split_order(rows, s * kSide, i * kSide, n.depth, to);
        }
      }
  }
  static void split_order(const StridedRows<T>& rows, int64_t row, int64_t at, int64_t depth, E* left) {
    for (int r = 0; r < kSide; ++r) {
      const T* from = rows.get(rows, row + r);
      int64_t count = from ? depth - at : 0;
      vf x[kVectors];
      for (int v = 0; v < kVectors; ++v, count -= W)
        x[v] = count >= W ? load(from + at + v * W) : count > 0 ? load(from + at + v * W, count) : vf{};
      F::put_left(left, r, x);
    }
  }

  // What is decoded at once: forward the rows of a block and a chunk of the depth, backward a chunk of the depth and
  // kWide columns, so that a group's numbers are made once for many of its codes.
  static constexpr int64_t kWide = 4 * kSide;

  static void pack_right(const Linear& a, int64_t begin, int64_t end, E* to) {
    int64_t all = blocks(a.k);
    alignas(64) T memory[kSide * kDepth];
    WeightPart<T> part;
    to += begin * all * F::kBlock;
    for (int64_t j = begin; j < end; ++j)
      for (int64_t i = 0; i < all; ++i, to += F::kBlock) {
        if (i % kDeep == 0) part.decode(a, j * kSide, kSide, i * kSide, kDepth, memory);
        part.put(a, false, j * kSide, i * kSide, to);
      }
  }

  // Columns [begin, end) of the result, in contiguous blocks of their own until they are written. A column of blocks
  // meets one chunk of the weight, which stays in the first-level cache while the row blocks pass by; the next chunk is
  // on its way to the second level meanwhile. (The row blocks are not asked for: into the first level, it costs more
  // than it gives wherever the tile unit has its core to itself.)
  template <class Call>
  static void columns(const Call& a, bool backward, const E* left, int64_t begin, int64_t end, void* memory) {
    Sizes n(a, backward);
    int64_t wide = blocks(end - begin), all = blocks(n.depth), row_blocks = blocks(a.m);
    const float* bias = backward ? nullptr : a.bias;
    float* c = (float*)memory;
    E* right = (E*)(c + row_blocks * wide * kSide * kSide);
    T* decoded = (T*)(right + kDeep * F::kBlock);
    WeightPart<T> part;
    F::begin();
    for (int64_t d = 0; d < all; d += kDeep) {
      int64_t deep = all - d < kDeep ? all - d : kDeep;
      int64_t elements = n.depth - d * kSide < kDepth ? n.depth - d * kSide : kDepth;
      if (backward) elements = deep * kSide;  // the split order has its zeros anywhere
      for (int64_t j = 0; j < wide; ++j) {
        int64_t column = begin + j * kSide;
        const E* operand = right;
        if (a.packed) {
          operand = (const E*)a.packed + (column / kSide * all + d) * F::kBlock;
        } else {
          if (!backward) {
            part.decode(a, column, kSide, d * kSide, deep * kSide, decoded);
          } else if (j * kSide % kWide == 0) {
            part.decode(a, d * kSide, deep * kSide, column, kWide, decoded);
          }
          for (int64_t i = 0; i < deep; ++i) {
            int64_t at = (d + i) * kSide;
            part.put(a, backward, backward ? at : column, backward ? column : at, right + i * F::kBlock);
          }
        }
        Coming next(a, backward, j + 1 < wide ? d : d + kDeep, j + 1 < wide ? column + kSide : begin);
        for (int64_t s = 0; s < row_blocks; ++s) {
          next.prefetch(s, row_blocks);
          float* block = c + (j * row_blocks + s) * kSide * kSide;
          F::multiply(block, kSide, left + left_at<F>(s, d, row_blocks, all), operand, elements, a.m - s * kSide,
                      end - column, d > 0);
          if (d + kDeep < all) continue;
          write_block(a, block, bias, n.columns, s * kSide, column);
        }
      }
    }
    F::end();
    if (a.stream) fence();
  }

  // A chunk of the weight that is needed soon: `lines` runs of bytes.
  struct Coming {
    const char* first = nullptr;
    int64_t lines = 0, stride = 0, bytes = 0;

    Coming(const Linear& a, bool backward, int64_t d, int64_t column) {
      int64_t all = blocks(Sizes(a, backward).depth);
      if (d >= all) return;
      int64_t deep = all - d < kDeep ? all - d : kDeep;
      if (a.packed) {
        first = (const char*)((const E*)a.packed + (column / kSide * all + d) * F::kBlock);
        stride = bytes = 64, lines = deep * F::kBlock * sizeof(E) / 64;
        return;
      }
      int64_t row = backward ? d * kSide : column, at = backward ? column : d * kSide;
      int64_t rows = backward ? deep * kSide : kSide, elements = backward ? kSide : deep * kSide;
      lines = a.n - row < rows ? a.n - row : rows;
      first = (const char*)a.codes + row * a.code_row + code_bytes(a.kind, at);
      stride = a.code_row, bytes = code_bytes(a.kind, elements);
    }
    // Part s of so many.
    inline __attribute__((always_inline)) void prefetch(int64_t s, int64_t parts) const {
      for (int64_t l = lines * s / parts; l < lines * (s + 1) / parts; ++l)
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + l * stride + i, 0, 2);
    }
  };

  BK_INLINE void write_block(const Linear& a, const float* c, const float* bias, int64_t width, int64_t row,
                             int64_t column) {
    if (a.out_type == Type::f32) {
      write_out(a, c, bias, (float*)a.out, width, row, column);
    } else {
      write_out(a, c, bias, (T*)a.out, width, row, column);
    }
  }
  static inline void write_block(const ActivatedLinear& a, const float* c, const float* bias, int64_t width,
                                 int64_t row, int64_t column) {
    write_activated<T>(a, c, bias, width, row, column);
  }

  // A block of the result, at (row, column), to where it belongs.
  template <class To>
  BK_INLINE void write_out(const Linear& a, const float* c, const float* bias, To* out, int64_t width, int64_t row,
                           int64_t column) {
    int64_t rows = a.m - row < kSide ? a.m - row : kSide, count = width - column;
    vf added[kVectors];
    for (int v = 0; v < kVectors; ++v, count -= W)
      added[v] = !bias || count <= 0 ? vf{}
                 : count >= W        ? load(bias + column + v * W)
                                     : load(bias + column + v * W, count);
    out += row * width + column;
    if (a.stream && width - column >= kSide) {  // a third of the time of plain stores, which fetch their lines first
      for (int64_t r = 0; r < rows; ++r, out += width, c += kSide)
        for (int v = 0; v < kVectors; v += 2)
          stream2(out + v * W, load(c + v * W) + added[v], load(c + v * W + W) + added[v + 1]);
      return;
    }
    for (int64_t r = 0; r < rows; ++r, out += width, c += kSide) {
      count = width - column;
      for (int v = 0; v < kVectors && count > 0; ++v, count -= W) {
        vf y = load(c + v * W) + added[v];
        count >= W ? store(out + v * W, y) : store(out + v * W, y, count);
      }
    }
  }

  static int64_t row_block_bytes(const Linear& a, bool backward) {
    return blocks(Sizes(a, backward).depth) * F::kBlock * sizeof(E);
  }
  static int64_t workspace(const Linear& a, int64_t columns) {
    return blocks(a.m) * blocks(columns) * kSide * kSide * sizeof(float) + kDeep * F::kBlock * sizeof(E) +
           kDepth * kWide * sizeof(T);
  }
};

// run(Many<T>()) for the type T of the operands.
template <class Run>
BK_INLINE auto with_many(const Linear& a, Run run) {
  return by_type(a.type, [&](auto t) { return run(Many<decltype(t)>()); });
}

}  // namespace
}  // namespace BK_ISA
}  // namespace bigkernels
