// Linear layers, many tokens: 32x32 blocks of the weight, whatever it is stored as, are made into the operand of the
// tile loop, a few hundred kilobytes at a time, forward and backward; the whole weight never exists in another form,
// unless the caller keeps it packed.
#include "gemm.h"
#include "linear_codes.h"

namespace bigkernels {
namespace BK_ISA {
namespace {

constexpr int64_t kDepth = 256;  // decoded at once
constexpr int64_t kStrips = 16;  // of 32 tokens that share what was decoded

struct Sizes {
  int64_t depth, columns;
  Sizes(const Linear& a, bool backward) : depth(backward ? a.n : a.k), columns(backward ? a.k : a.n) {}
};

template <class T>
struct Many {
  typedef typename FormatOf<T>::type F;
  typedef typename F::Element E;

  // Strips [begin, end) of `in` as left operands. Where the rows of the weight are the depth, as in backward, it is in
  // the split order, in which straight blocks on the right come.
  static void pack_left(const Linear& a, bool backward, int64_t begin, int64_t end, E* left) {
    Sizes n(a, backward);
    StridedRows<T> rows{(const T*)a.in.data, a.in.stride, a.in_turned ? n.depth : a.m};
    alignas(64) E staged[F::kBlock];
    left += begin * blocks(n.depth) * F::kBlock;
    for (int64_t s = begin; s < end; ++s)
      for (int64_t i = 0; i < blocks(n.depth); ++i, left += F::kBlock) {
        if (a.in_turned) {
          F::template stage<T>(staged, rows, i * kSide, s * kSide, a.m);
          F::left_turned(left, staged);
        } else if (!backward) {
          F::template stage<T>(left, rows, s * kSide, i * kSide, n.depth);
        } else {
          split_order(rows, s * kSide, i * kSide, n.depth, left);
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

  // Block (rows of the weight from n, elements from k) as a right operand.
  static void decode(const Linear& a, bool backward, int64_t n, int64_t k, E* to) {
    alignas(64) E staged[F::kBlock];
    if (a.kind == plain_kind<T>) {
      F::template stage<T>(staged, StridedRows<T>{(const T*)a.codes, a.code_row / (int64_t)sizeof(T), a.n}, n, k, a.k);
    } else {
      alignas(64) T tile[kSide * kSide];
      int64_t rows = a.n - n < kSide ? a.n - n : kSide;
      for (int64_t r = 0; r < rows; ++r) decode32(a, n + r, k, tile + r * kSide);
      F::template stage<T>(staged, StridedRows<T>{tile, kSide, rows}, 0, 0, kSide);
    }
    if (backward) {
      F::right(to, staged);
    } else {
      F::right_turned(to, staged);
    }
  }
  static void pack_right(const Linear& a, int64_t begin, int64_t end, E* to) {
    int64_t all = blocks(a.k);
    to += begin * all * F::kBlock;
    for (int64_t j = begin; j < end; ++j)
      for (int64_t i = 0; i < all; ++i, to += F::kBlock) decode(a, false, j * kSide, i * kSide, to);
  }

  static void columns(const Linear& a, bool backward, const E* left, int64_t begin, int64_t end, void* memory) {
    Sizes n(a, backward);
    int64_t wide = blocks(end - begin), all = blocks(n.depth), strips = blocks(a.m), ldc = wide * kSide;
    float* c = (float*)memory;
    E* right = (E*)(c + kStrips * kSide * ldc);
    F::begin();
    for (int64_t first = 0; first < strips; first += kStrips) {
      int64_t some = strips - first < kStrips ? strips - first : kStrips;
      for (int64_t d = 0; d < all; d += kDepth / kSide) {
        int64_t deep = all - d < kDepth / kSide ? all - d : kDepth / kSide;
        int64_t elements = n.depth - d * kSide < kDepth ? n.depth - d * kSide : kDepth;
        if (backward) elements = deep * kSide;  // the split order has its zeros anywhere
        const E* operand = right;
        int64_t pitch = deep;
        if (a.packed) {
          operand = (const E*)a.packed + (begin / kSide * all + d) * F::kBlock;
          pitch = all;
        }
        for (int64_t j = 0; j < wide && !a.packed; ++j)
          for (int64_t i = 0; i < deep; ++i) {
            int64_t column = begin + j * kSide, at = (d + i) * kSide;
            decode(a, backward, backward ? at : column, backward ? column : at, right + (j * deep + i) * F::kBlock);
          }
        for (int64_t s = 0; s < some; ++s)
          for (int64_t j = 0; j < wide; ++j)
            F::multiply(c + s * kSide * ldc + j * kSide, ldc, left + ((first + s) * all + d) * F::kBlock,
                        operand + j * pitch * F::kBlock, elements, a.m - (first + s) * kSide, end - begin - j * kSide,
                        d > 0);
      }
      for (int64_t r = first * kSide; r < (first + some) * kSide && r < a.m; ++r)
        put(a, c + (r - first * kSide) * ldc, r * n.columns, backward ? nullptr : a.bias, begin, end);
    }
    F::end();
  }

  static void put(const Linear& a, const float* c, int64_t row, const float* bias, int64_t begin, int64_t end) {
    if (a.out_type == Type::f32) {
      put(c, bias, (float*)a.out + row, begin, end);
    } else {
      put(c, bias, (T*)a.out + row, begin, end);
    }
  }
  template <class To>
  static void put(const float* c, const float* bias, To* to, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += W) {
      int64_t left = end - i;
      vf v = load(c + i - begin);
      if (bias) v += left >= W ? load(bias + i) : load(bias + i, left);
      if (left >= W)
        store(to + i, v);
      else
        store(to + i, v, left);
    }
  }

  static int64_t strip(const Linear& a, bool backward) {
    return blocks(Sizes(a, backward).depth) * F::kBlock * sizeof(E);
  }
  static int64_t workspace(int64_t columns) {
    int64_t wide = blocks(columns);
    return kStrips * kSide * wide * kSide * sizeof(float) + wide * (kDepth / kSide) * F::kBlock * sizeof(E);
  }
};

// f of the class that serves the type
template <class Run>
BK_INLINE auto by_type(Type type, Run run) {
  switch (type) {
    case Type::bf16: return run(Many<bf16>());
    case Type::f16: return run(Many<f16>());
    default: return run(Many<float>());
  }
}

}  // namespace

void linear_pack_left(const Linear& a, bool backward, int64_t begin, int64_t end, void* left) {
  by_type(a.type, [&](auto many) { many.pack_left(a, backward, begin, end, (typename decltype(many)::E*)left); });
}
void linear_many(const Linear& a, bool backward, const void* left, int64_t begin, int64_t end, void* memory) {
  by_type(a.type,
          [&](auto many) { many.columns(a, backward, (const typename decltype(many)::E*)left, begin, end, memory); });
}
int64_t linear_strip(const Linear& a, bool backward) {
  return by_type(a.type, [&](auto many) { return many.strip(a, backward); });
}
int64_t linear_workspace(const Linear& a, int64_t columns) {
  return by_type(a.type, [&](auto many) { return many.workspace(columns); });
}
void linear_pack_right(const Linear& a, int64_t begin, int64_t end, void* packed) {
  by_type(a.type, [&](auto many) { many.pack_right(a, begin, end, (typename decltype(many)::E*)packed); });
}
int64_t linear_packed_strip(const Linear& a) {
  return by_type(a.type, [&](auto many) { return many.strip(a, false); });
}

}  // namespace BK_ISA
}  // namespace bigkernels
