// What every CPU binding shares and no header needs to hold.
#include <bigkernels/pool.h>
#include <bigkernels/runner.h>
#include <bigkernels/stable.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bigkernels {

void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  constexpr int64_t huge = int64_t{2} << 20;
  if (bytes < 2 * huge || pool_owns(data)) return;  // the pool asks for its whole range
  uintptr_t begin = ((uintptr_t)data + page - 1) & ~(page - 1), end = ((uintptr_t)data + bytes) & ~(page - 1);
  madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // advice: where it is refused, nothing changes
#else
  (void)data, (void)bytes;
#endif
}

namespace {

constexpr int64_t kKept = int64_t{64} << 20;  // larger ones go back to the system

// Bytes of all idle workspaces, and how many there may be.
std::atomic<int64_t> kept{0}, most_kept{int64_t{512} << 20};
// The workspaces of a thread that no call uses: two, as a call may hold one while another one works. The lock is taken
// by the thread itself, and by another one only to free them.
struct Idle {
  struct Block {
    void* data = nullptr;
    int64_t size = 0;
  } blocks[2];
  std::mutex mutex;
  Idle *before = nullptr, *after = nullptr;  // of all threads

  Idle();
  ~Idle();
  int64_t release() {
    std::lock_guard<std::mutex> lock(mutex);
    int64_t freed = 0;
    for (Block& b : blocks) {
      std::free(b.data);
      freed += b.size;
      b = {};
    }
    kept.fetch_sub(freed, std::memory_order_relaxed);
    return freed;
  }
};

struct Threads {
  std::mutex mutex;
  Idle* first = nullptr;
};
thread_local Idle* own = nullptr;

void after_fork(Threads& t);

// Never destroyed: threads end after it would be.
Threads& threads() {
  static Threads* const instance = [] {
    auto t = new Threads;
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork([] { threads().mutex.lock(); }, [] { threads().mutex.unlock(); }, [] { after_fork(threads()); });
#endif
    return t;
  }();
  return *instance;
}

// The other threads are not in the child, and their memory there may become that of new ones.
void after_fork(Threads& t) {
  t.first = own;
  int64_t mine = 0;
  if (own) {
    own->before = own->after = nullptr;
    for (const Idle::Block& b : own->blocks) mine += b.size;
  }
  kept.store(mine, std::memory_order_relaxed);
  t.mutex.unlock();
}

Idle::Idle() {
  own = this;
  std::lock_guard<std::mutex> lock(threads().mutex);
  after = threads().first;
  if (after) after->before = this;
  threads().first = this;
}
Idle::~Idle() {
  own = nullptr;
  release();
  std::lock_guard<std::mutex> lock(threads().mutex);
  (before ? before->after : threads().first) = after;
  if (after) after->before = before;
}
thread_local Idle idle;

}  // namespace

Scratch::Scratch(int64_t bytes) : data_(nullptr), size_(0) {
  Idle& mine = idle;
  {
    std::lock_guard<std::mutex> lock(mine.mutex);
    for (Idle::Block& b : mine.blocks)
      if (b.size >= bytes && (!data_ || b.size < size_)) {
        std::swap(b.data, data_);
        std::swap(b.size, size_);
      }
  }
  if (data_) {
    kept.fetch_sub(size_, std::memory_order_relaxed);
    return;
  }
  size_ = (bytes + 4095) / 4096 * 4096;
  data_ = std::aligned_alloc(4096, size_);
  STD_TORCH_CHECK(data_, "bigkernels: no memory for a workspace of ", size_, " bytes");
  prefer_huge_pages(data_, size_);
}

Scratch::~Scratch() {
  if (size_ <= kKept && kept.load(std::memory_order_relaxed) + size_ <= most_kept.load(std::memory_order_relaxed)) {
    int64_t size = size_;
    Idle& mine = idle;
    std::lock_guard<std::mutex> lock(mine.mutex);
    for (Idle::Block& b : mine.blocks)
      if (b.size < size_) {  // the larger ones stay
        std::swap(b.data, data_);
        std::swap(b.size, size_);
      }
    kept.fetch_add(size - size_, std::memory_order_relaxed);
  }
  std::free(data_);
}

int64_t workspaces_kept() { return kept.load(std::memory_order_relaxed) + program_kept(); }

int64_t release_workspaces() {
  std::lock_guard<std::mutex> lock(threads().mutex);
  int64_t freed = 0;
  for (Idle* i = threads().first; i; i = i->after) freed += i->release();
  return freed + program_release();
}

int64_t limit_workspaces(int64_t bytes) {
  int64_t before = most_kept.exchange(bytes, std::memory_order_relaxed);
  if (workspaces_kept() > bytes) release_workspaces();
  return before;
}

VectorView::VectorView(const char* op, const char* name, const MaybeTensor& t, int64_t size, float offset) {
  if (!t) return;
  check_cpu(op, name, *t);
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == size, "bigkernels::", op, ": ", name, " must have ", size,
                  " elements");
  ScalarType dtype = t->scalar_type();
  bool kernel_type = dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  STD_TORCH_CHECK(kernel_type || dtype == ScalarType::Double, "bigkernels::", op, ": ", name, " must be floating");
  holder_ = kernel_type ? *t : torch::stable::to(*t, ScalarType::Float);
  if (size > 1 && holder_.stride(0) != 1) holder_ = torch::stable::contiguous(holder_);
  const void* values = holder_.const_data_ptr();
  Type type = type_of(holder_);
  if (type == Type::f32 && offset == 0) {
    data_ = (const float*)values;
    return;
  }
  copy_ = size <= kInline ? inline_ : new float[size];
  if (type == Type::f32) {
    std::memcpy(copy_, values, size * sizeof(float));
  } else {
    table().convert(type, false, values, copy_, size);
  }
  if (offset != 0)
    for (int64_t i = 0; i < size; ++i) copy_[i] += offset;
  data_ = copy_;
}

Tensor empty_dense_like(const Tensor& x) {
  int64_t sizes[4], strides[4], dense = 1;
  for (int i = 0; i < 4; ++i) sizes[i] = x.size(i), strides[i] = x.stride(i);
  int order[4] = {3, 2, 1, 0};
  for (int i = 1; i < 4; ++i)  // insertion sort by stride, smallest first
    for (int j = i; j > 0 && strides[order[j]] < strides[order[j - 1]]; --j) std::swap(order[j], order[j - 1]);
  for (int i : order) {
    if (sizes[i] == 1) continue;
    if (strides[i] != dense) return empty_contiguous_like(x);
    dense *= sizes[i];
  }
  return empty_strided(sizes, strides, 4, x.scalar_type(), dense * size_of(type_of(x)));
}

AngleView::AngleView(const char* op, const MaybeTensor& cos, const MaybeTensor& sin, const Tensor& q,
                     bool interleaved) {
  constexpr int64_t kMaxRotary = 1024;  // as in the kernels and in bigkernels/ops/rope.py
  if (!cos) return;
  check_cpu(op, "cos", *cos);
  check_cpu(op, "sin", *sin);
  STD_TORCH_CHECK(cos->dim() == 3 && sin->dim() == 3, "bigkernels::", op, ": cos and sin must be (B or 1, S, R)");
  for (int i = 0; i < 3; ++i)
    STD_TORCH_CHECK(cos->size(i) == sin->size(i), "bigkernels::", op, ": cos and sin have different shapes");
  int64_t rotary = cos->size(2);
  STD_TORCH_CHECK((cos->size(0) == 1 || cos->size(0) == q.size(0)) && cos->size(1) == q.size(2) &&
                      rotary <= q.size(3) && rotary % 2 == 0 && rotary <= kMaxRotary,
                  "bigkernels::", op, ": cos and sin do not fit q");
  STD_TORCH_CHECK(cos->scalar_type() == sin->scalar_type(), "bigkernels::", op, ": cos and sin have different dtypes");
  auto readable = [](const Tensor& t) {
    return last_contiguous(t.scalar_type() == ScalarType::Double ? torch::stable::to(t, ScalarType::Float) : t);
  };
  cos_ = readable(*cos), sin_ = readable(*sin);
  auto batch_stride = [](const Tensor& t) { return t.size(0) == 1 ? 0 : t.stride(0); };
  angles = {cos_.const_data_ptr(),
            sin_.const_data_ptr(),
            batch_stride(cos_),
            cos_.stride(1),
            batch_stride(sin_),
            sin_.stride(1),
            rotary,
            type_of(cos_),
            interleaved};
}

PartialSums::PartialSums(const Tensor& x, const MaybeTensor& like, int64_t blocks, int64_t d)
    : like_(like), dtype_(like ? like->scalar_type() : x.scalar_type()), blocks_(blocks), d_(d) {
  if (!like) return;
  recent_.resize(blocks * d);
  total_.resize(blocks * d);
}

Tensor PartialSums::total() const {
  if (!like_) return empty_1d(0, dtype_);
  Tensor total = empty_1d(d_);
  float* sums = (float*)total.mutable_data_ptr();
  for (int64_t i = 0; i < d_; ++i) {
    double sum = 0;
    for (int64_t b = 0; b < blocks_; ++b) sum += total_[b * d_ + i];
    sums[i] = (float)sum;
  }
  return dtype_ == ScalarType::Float ? total : torch::stable::to(total, dtype_);
}

static std::string cpu_isa() { return isa_name(); }

// Sets the thresholds of all calls to come; returns those before.
static std::tuple<int64_t, int64_t> set_thresholds(int64_t grain, int64_t stream) {
  STD_TORCH_CHECK(grain >= 1 && stream >= 0, "bigkernels::thresholds: grain must be at least 1, stream at least 0");
  return {thresholds.grain.exchange(grain), thresholds.stream.exchange(stream)};
}

STABLE_TORCH_LIBRARY_IMPL(bigkernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("thresholds", TORCH_BOX(&set_thresholds));
}

}  // namespace bigkernels
