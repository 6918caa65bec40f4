// Helpers over LibTorch's stable ABI: allocation, rows, threads and checks, as the CPU bindings need them.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "table.h"

namespace bigkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Where a call changes its form. Tests lower both (bigkernels::thresholds), so that small tensors take every path.
struct Thresholds {
  // Below this many bytes a second thread costs more than it saves. At least 1.
  std::atomic<int64_t> grain{64 * 1024};
  // Outputs at least this large do not fit the caches, so they are stored past them.
  std::atomic<int64_t> stream{int64_t{1} << 20};
};
inline Thresholds thresholds;
inline int64_t grain_bytes() { return thresholds.grain.load(std::memory_order_relaxed); }
inline int64_t stream_bytes() { return thresholds.stream.load(std::memory_order_relaxed); }

inline Type type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default: STD_TORCH_CHECK(false, "bigkernels: the CPU kernels take float32, bfloat16 and float16");
  }
}
inline Type type_of(const Tensor& t) { return type_of(t.scalar_type()); }

// Asks for huge pages under a large, untouched allocation: its page faults would cost more than the kernel.
void prefer_huge_pages(void* data, int64_t bytes);

// Through the C shim: the stable wrappers look their operator up by name, which costs more than the allocation.
inline Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType dtype,
                            int64_t bytes) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, (int32_t)dtype, aoti_torch_device_type_cpu(), 0, &handle));
  Tensor t(handle);
  prefer_huge_pages(t.mutable_data_ptr(), bytes);
  return t;
}

inline Tensor empty_1d(int64_t size, ScalarType dtype = ScalarType::Float) {
  int64_t one = 1;
  return empty_strided(&size, &one, 1, dtype, size * (dtype == ScalarType::Long ? 8 : 4));
}
// What a raw operator returns for an output that was not asked for.
inline Tensor none(const Tensor& like) { return empty_1d(0, like.scalar_type()); }

constexpr int64_t kMaxDim = 16;

// Contiguous, with the first `dim` sizes of x.
inline Tensor empty_like_leading(const Tensor& x, int64_t dim, ScalarType dtype) {
  int64_t sizes[kMaxDim], strides[kMaxDim], stride = 1;
  STD_TORCH_CHECK(dim <= kMaxDim, "bigkernels: more than 16 dimensions");
  for (int64_t i = dim - 1; i >= 0; --i) {
    sizes[i] = x.size(i);
    strides[i] = stride;
    stride *= sizes[i];
  }
  return empty_strided(sizes, strides, dim, dtype, stride * (dtype == ScalarType::Float ? 4 : 2));
}
inline Tensor empty_contiguous_like(const Tensor& x) { return empty_like_leading(x, x.dim(), x.scalar_type()); }

// Like torch.empty_like of (B, H, S, D): x's strides where it is dense in some order of its dimensions, else
// contiguous.
Tensor empty_dense_like(const Tensor& x);

// The tensor, or a copy of it, with the elements of its last dimension next to each other.
inline Tensor last_contiguous(const Tensor& x) {
  int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

// As `like` in bigkernels/ops/_attention.py: tokens outside of heads in memory where x has them so.
inline Tensor empty_heads(const Tensor& x, int64_t size) {
  int64_t batch = x.size(0), heads = x.size(1), length = x.size(2);
  int64_t sizes[4] = {batch, heads, length, size};
  bool tokens_first = x.stride(1) < x.stride(2);
  int64_t strides[4] = {heads * length * size, tokens_first ? size : length * size, tokens_first ? heads * size : size,
                        1};
  return empty_strided(sizes, strides, 4, x.scalar_type(), batch * heads * length * size * size_of(type_of(x)));
}

// A tensor as rows of its last dimension at one stride; copied where its strides allow no such view.
struct RowView {
  Tensor holder;
  Rows rows;
  int64_t count = 0, d = 0;

  explicit RowView(const Tensor& t) : holder(t) {
    int64_t dim = t.dim();
    if (dim == 0) {  // one element
      rows = {holder.const_data_ptr(), 1}, count = d = 1;
      return;
    }
    d = t.size(dim - 1);
    count = d ? t.numel() / d : 0;
    int64_t stride = d;
    bool ok = d <= 1 || t.stride(dim - 1) == 1;
    int64_t inner = -1;  // the innermost leading dimension of more than one row sets the stride
    for (int64_t i = dim - 2; ok && i >= 0; --i) {
      if (t.size(i) == 1) continue;
      if (inner < 0) {
        stride = t.stride(i);
        inner = stride * t.size(i);
      } else {
        ok = t.stride(i) == inner;
        inner *= t.size(i);
      }
    }
    if (!ok) {
      holder = torch::stable::contiguous(t);
      stride = d;
    }
    rows = {holder.const_data_ptr(), stride};
  }
};

inline void check_cpu(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), "bigkernels::", op, ": ", name, " is not on the CPU");
}
inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_cpu(op, name, t);
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.dim() == x.dim(), "bigkernels::", op, ": ", name,
                  " does not have the dtype and dimensions of the first argument");
  for (int64_t i = 0; i < x.dim(); ++i)
    STD_TORCH_CHECK(t.size(i) == x.size(i), "bigkernels::", op, ": ", name,
                    " has another shape than the first argument");
}

// What a forward pass returned, as a backward pass reads it: on the CPU, of this dtype and shape.
inline void check_made(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                       std::initializer_list<int64_t> sizes) {
  check_cpu(op, name, t);
  bool fits = t.scalar_type() == dtype && t.dim() == (int64_t)sizes.size();
  for (int64_t i = 0; fits && i < t.dim(); ++i) fits = t.size(i) == sizes.begin()[i];
  STD_TORCH_CHECK(fits, "bigkernels::", op, ": ", name, " does not have the dtype and shape of what forward returned");
}

// A vector of `size` elements as the kernels read it: contiguous float32, with `offset` added. A float32 vector without
// an offset is read where it is; a short converted one stays on the stack.
class VectorView {
 public:
  VectorView(const char* op, const char* name, const MaybeTensor& t, int64_t size, float offset = 0);
  ~VectorView() {
    if (copy_ != inline_) delete[] copy_;
  }
  VectorView(const VectorView&) = delete;
  VectorView& operator=(const VectorView&) = delete;
  const float* data() const { return data_; }  // null where there is no tensor

 private:
  static constexpr int64_t kInline = 1024;
  Tensor holder_;
  const float* data_ = nullptr;
  float* copy_ = nullptr;
  float inline_[kInline];
};

// cos and sin, (B or 1, S, R), as the kernels read them for q, (B, H, S, D); no elements where there are none.
class AngleView {
 public:
  AngleView(const char* op, const MaybeTensor& cos, const MaybeTensor& sin, const Tensor& q, bool interleaved);
  Angles angles{};

 private:
  Tensor cos_, sin_;
};

// Streaming stores want whole, aligned cache lines, and an output that the caches would not keep anyway.
inline bool worth_streaming(const void* out, int64_t row_bytes, int64_t all_bytes) {
  return all_bytes >= stream_bytes() && row_bytes % 64 == 0 && (uintptr_t)out % 64 == 0;
}
inline bool worth_streaming(const Tensor& out, int64_t row_bytes, int64_t all_bytes) {
  return worth_streaming(out.const_data_ptr(), row_bytes, all_bytes);
}

// f(begin, end) over `rows` rows in torch's threads; small work stays on the caller's thread.
template <class F>
void parallel_rows(int64_t rows, int64_t bytes_a_row, const F& f) {
  if (rows <= 0) return;
  int64_t least = grain_bytes();
  if (rows * bytes_a_row < 2 * least) return f(0, rows);
  int64_t grain = least / (bytes_a_row > 0 ? bytes_a_row : 1);
  torch::stable::parallel_for(0, rows, grain > 1 ? grain : 1, f);
}

// f(block, begin, end): the rows cut into one block a thread, each with partial sums of its own, so that the sums'
// order depends on the thread count alone. Returns the number of blocks.
inline int64_t block_count(int64_t rows, int64_t bytes_a_row) {
  int64_t threads = torch::stable::get_num_threads(), most = rows * bytes_a_row / grain_bytes();
  int64_t blocks = most < threads ? most : threads;
  blocks = blocks < rows ? blocks : rows;
  return blocks > 1 ? blocks : 1;
}
template <class F>
void parallel_blocks(int64_t blocks, int64_t rows, const F& f) {
  auto run = [&](int64_t b) { f(b, rows * b / blocks, rows * (b + 1) / blocks); };
  if (blocks == 1) return run(0);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) run(b);
  });
}

// A workspace on a cache line. Each thread keeps a few of moderate size from call to call: fresh memory is paid for in
// page faults.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return (char*)data_; }

 private:
  void* data_;
  int64_t size_;
};

// Bytes of the workspaces that no call uses, of all threads; free them, and return how many; keep at most so many from
// here on, and return how many there might be.
int64_t workspaces_kept();
int64_t release_workspaces();
int64_t limit_workspaces(int64_t bytes);

// f(i) for i in [0, count), each on the first thread that is free: for work of uneven size. What f computes must not
// depend on the thread.
template <class F>
void parallel_tasks(int64_t count, const F& f) {
  int64_t threads = torch::stable::get_num_threads();
  if (threads > count) threads = count;
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
  });
}

// Whether a softcap is one in float32 too, or none (0): a tiny one would become none, and a huge one NaN.
inline bool usable_softcap(double cap) { return cap == 0 || ((float)cap > 0 && (float)cap <= 3.4028235e38f); }

// An end of attention's window, -1 where it is unlimited. No sequence has so many keys, and sums of positions and
// windows stay far from overflow.
inline int64_t window_end(int64_t keys) { return keys < 0 || keys >= int64_t{1} << 40 ? -1 : keys; }

// Attention of few queries, over torch's threads (ops/decode_attention.cpp): the keys are split as well, so that one
// sequence keeps all of them busy. Fills out, and lse unless it is null. Arguments that only backward reads are
// ignored; there is no dropout. The same arguments on the same number of threads give the same bits.
void decode_attention(const DecodeAttention&);

// The gradient of a vector that all rows share.
class PartialSums {
 public:
  // `like`: the vector; none where there is none, or where its gradient is not wanted.
  PartialSums(const Tensor& x, const MaybeTensor& like, int64_t blocks, int64_t d);
  ColumnSums sums() { return {recent_.empty() ? nullptr : recent_.data(), total_.data()}; }
  Tensor total() const;  // summed over the blocks in order, in the dtype of the vector; empty where there is none

 private:
  MaybeTensor like_;
  ScalarType dtype_;
  int64_t blocks_, d_;
  std::vector<float> recent_;
  std::vector<double> total_;
};

}  // namespace bigkernels
