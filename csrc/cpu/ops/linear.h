// Linear layers over torch's threads, whatever the weight is stored as.
#pragma once
#include <bigkernels/stable.h>

#include <algorithm>
#include <vector>

namespace bigkernels {

constexpr int64_t kPackedBytes = int64_t{16} << 20;  // of packed tokens at once
// Tokens and columns of the result that a task makes.
constexpr int64_t kTokens = 512, kColumns = 256;

// Whether the results are to be written past the caches, and the place of them so many bytes further on. A call with
// more results than one has functions of its own.
inline bool streams(const Linear& a, int64_t row_bytes, int64_t all_bytes) {
  return worth_streaming(a.out, row_bytes, all_bytes);
}
inline void move_on(Linear& a, int64_t bytes) { a.out = (char*)a.out + bytes; }

// The tokens of a call in groups of kTokens, its columns in runs of kColumns: pack(part, begin, end, left, scales) for
// row blocks [begin, end) of 32 tokens of a group, `row_block_bytes` each, then run(part, left, scales, begin, end) for
// columns.
template <class Call, class Pack, class Run>
void for_groups(const Call& call, int64_t columns, int64_t row_block_bytes, const Pack& pack, const Run& run) {
  Call a = call;
  int64_t row_bytes = columns * size_of(a.out_type), group = kTokens / 32 * row_block_bytes;
  int64_t all = (a.m + kTokens - 1) / kTokens, at_once = std::clamp<int64_t>(kPackedBytes / group, 1, all);
  int64_t tasks = (columns + kColumns - 1) / kColumns;
  a.stream = streams(a, row_bytes, a.m * row_bytes);
  auto part_of = [&](int64_t g) {
    Call part = a;
    part.in.data = (const char*)a.in.data + g * kTokens * (a.in_transposed ? 1 : a.in.stride) * size_of(a.type);
    move_on(part, g * kTokens * row_bytes);
    part.m = std::min(kTokens, a.m - g * kTokens);
    return part;
  };
  Scratch left(std::min(at_once * group, (a.m + 31) / 32 * row_block_bytes));
  std::vector<float> scales(at_once * kTokens);  // of the tokens, where they have any
  for (int64_t first = 0; first < all; first += at_once) {
    int64_t groups = std::min(at_once, all - first), tokens = std::min(groups * kTokens, a.m - first * kTokens);
    parallel_rows((tokens + 31) / 32, row_block_bytes, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end;) {
        int64_t g = s * 32 / kTokens, at = g * kTokens / 32, next = std::min(end, at + kTokens / 32);
        pack(part_of(first + g), s - at, next - at, left.data() + g * group, scales.data() + g * kTokens);
        s = next;
      }
    });
    parallel_tasks(groups * tasks, [&](int64_t i) {
      int64_t g = i / tasks, begin = i % tasks * kColumns;
      run(part_of(first + g), left.data() + g * group, scales.data() + g * kTokens, begin,
          std::min(columns, begin + kColumns));
    });
  }
}

// The rows of a matrix as the weight of a product.
void set_weight(Linear& a, const Rows& rows, const Tensor& like, int64_t n, int64_t k);

// Contiguous, with the leading sizes of x and rows of n elements, in the dtype of x or in float32.
Tensor empty_rows(const char* op, const Tensor& x, int64_t n, bool wide = false);

// Fills out, forward for a few tokens, by reading the weight as it is stored.
void linear_few(const Linear&);
// Fills out, for any number of tokens.
void linear_many(const Linear&, bool backward);

}  // namespace bigkernels
