// The pool: best fit over neighbouring blocks of one reserved range of addresses, whose free blocks keep their pages.
//
// A block is used, warm (free, with pages) or cold (free, without). Free neighbours of one kind are always one block,
// so that what was cut up for small tensors can be given to a large one; a request that no warm block holds takes
// neighbours of both kinds, then new addresses. Records of blocks lie outside of them: a cold block has no page of its
// own.
#include <bigkernels/pool.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>

namespace bigkernels {
namespace {

constexpr int64_t kSmallest = int64_t{256} << 10;  // smaller tensors are malloc's, which keeps their pages anyway
constexpr int64_t kGranule = int64_t{16} << 10;    // sizes and places are multiples of it: at most 6.25 % of a block
constexpr int64_t kHuge = int64_t{2} << 20;
constexpr int64_t kGrowth = int64_t{32} << 20;
constexpr int64_t kSlack = int64_t{64} << 20;

constexpr int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
constexpr int64_t down(int64_t x, int64_t unit) { return x / unit * unit; }

enum class State : uint8_t { used, warm, cold };

struct Block {
  int64_t begin, end;  // bytes from the start of the range
  State state;
  int64_t freed;           // when, for warm blocks
  Block *before, *after;   // neighbours in memory
  Block *previous, *next;  // in the bin, for warm blocks
  int64_t size() const { return end - begin; }
};

// The range, for the one question asked without the lock. No bytes before there is one.
std::atomic<uintptr_t> range_begin{0}, range_size{0};

class Pool {
 public:
  std::mutex mutex;
  int64_t limit = 0;
  bool huge_pages = true;
  PoolStats stats{};

  // Addresses only, four times the memory of the machine, so that a range that has become cold and cut up is no
  // shortage; less where the system allows no more.
  bool reserve() {
    if (range_size) return true;
    int64_t most = 4 * (int64_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
    for (int64_t size = up(most, int64_t{1} << 30); size >= int64_t{1} << 30; size = up(size / 2, kHuge)) {
      void* range = mmap(nullptr, size + kHuge, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (range == MAP_FAILED) continue;
      void* owners = mmap(nullptr, size / kGranule * sizeof(Block*), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (owners == MAP_FAILED) {
        munmap(range, size + kHuge);
        continue;
      }
      base_ = (char*)up((int64_t)range, kHuge);
      owners_ = (Block**)owners;
      range_begin = (uintptr_t)base_;
      range_size = size;
      return true;
    }
    return false;
  }

  // Null where the range or the memory of the machine is used up.
  void* allocate(int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    if (bytes > (int64_t)range_size.load()) return nullptr;
    int64_t size = up(bytes, kGranule);
    Block* b = best_warm(size);
    bool hit = b;
    if (!hit) b = best_run(size);
    if (!b && !(b = grow(size))) return nullptr;
    take(b, size);
    ++(hit ? stats.hits : stats.misses);
    stats.in_use += b->size();
    stats.peak = std::max(stats.peak, stats.in_use);
    // What fragmentation may cost: new pages beyond this are paid for with the oldest that are free.
    if (!hit) shrink(std::max<int64_t>(0, stats.peak + stats.peak / 8 + kSlack - stats.in_use));
    owners_[b->begin / kGranule] = b;
    return base_ + b->begin;
  }

  void free(void* data) {
    std::lock_guard<std::mutex> lock(mutex);
    int64_t begin = (char*)data - base_;
    Block* b = owners_[begin / kGranule];
    if (!b || b->begin != begin) {
      std::fputs("bigkernels: a tensor's memory was freed twice, or at an address that it does not start at\n", stderr);
      std::abort();
    }
    owners_[begin / kGranule] = nullptr;
    stats.in_use -= b->size();
    stats.cached += b->size();
    put(b, State::warm);
    shrink(limit);
  }

  // Gives back the pages of the blocks that have been free for longest, until at most `most` bytes are cached.
  int64_t shrink(int64_t most) {
    int64_t before = stats.given_back;
    while (stats.cached > most) {
      Block* oldest = nullptr;
      for (Block* b = first_; b; b = b->after) {
        if (b->state != State::warm || (oldest && oldest->freed < b->freed)) continue;
        Pages pages = pages_of(b);
        if (pages.begin < pages.end) oldest = b;
      }
      if (!oldest || !give_back(oldest, stats.cached - most)) break;
    }
    return stats.given_back - before;
  }

 private:
  // Eight bins to a power of two of granules.
  static constexpr int kBins = 8 * 48;
  static int bin_of(int64_t size) {
    uint64_t n = size / kGranule;
    if (n < 8) return (int)n;
    int log = 63 - __builtin_clzll(n);
    return (log - 2) * 8 + (int)(n >> (log - 3) & 7);
  }

  // A part of a huge page goes back only once the system splits it.
  int64_t unit() const { return huge_pages ? kHuge : std::max<int64_t>(kGranule, sysconf(_SC_PAGESIZE)); }

  Block* record(int64_t begin, int64_t end, State state) {
    Block* b = spare_;
    if (b) {
      spare_ = b->next;
    } else {
      b = new Block;
    }
    *b = {begin, end, state, 0, nullptr, nullptr, nullptr, nullptr};
    return b;
  }

  void link_after(Block* b, Block* next) {
    next->before = b;
    next->after = b->after;
    (b->after ? b->after->before : last_) = next;
    b->after = next;
  }

  void enter_bin(Block* b) {
    Block*& head = bins_[bin_of(b->size())];
    b->previous = nullptr;
    b->next = head;
    if (head) head->previous = b;
    head = b;
  }
  void leave_bin(Block* b) {
    (b->previous ? b->previous->next : bins_[bin_of(b->size())]) = b->next;
    if (b->next) b->next->previous = b->previous;
  }

  // Makes b, which is in no bin, a free block, one with its free neighbours of that kind.
  void put(Block* b, State state) {
    b->state = state;
    b->freed = ++clock_;
    if (b->before && b->before->state == state) {
      b = b->before;
      if (state == State::warm) leave_bin(b);
      absorb_next(b);
      b->freed = clock_;
    }
    if (b->after && b->after->state == state) {
      if (state == State::warm) leave_bin(b->after);
      absorb_next(b);
    }
    if (state == State::warm) enter_bin(b);
  }

  void absorb_next(Block* b) {
    Block* gone = b->after;
    b->end = gone->end;
    b->after = gone->after;
    (b->after ? b->after->before : last_) = b;
    gone->next = spare_;
    spare_ = gone;
  }

  // Cuts a block in two; the second part is of the same kind and age. Neither is in a bin.
  Block* cut(Block* b, int64_t at) {
    Block* rest = record(at, b->end, b->state);
    rest->freed = b->freed;
    b->end = at;
    link_after(b, rest);
    return rest;
  }

  // The smallest that is large enough, of these the one freed last.
  Block* best_warm(int64_t size) {
    for (int i = bin_of(size); i < kBins; ++i) {
      Block* best = nullptr;
      for (Block* b = bins_[i]; b; b = b->next)
        if (b->size() >= size && (!best || b->size() < best->size())) best = b;
      if (best) return best;
    }
    return nullptr;
  }

  // The first block of the smallest run of free neighbours that is large enough.
  Block* best_run(int64_t size) {
    Block *best = nullptr, *start = nullptr;
    int64_t best_size = 0;
    for (Block* b = first_; b; b = b->after) {
      if (b->state == State::used) {
        start = nullptr;
        continue;
      }
      if (!start) start = b;
      bool whole = !b->after || b->after->state == State::used;
      int64_t run = b->end - start->begin;
      if (whole && run >= size && (!best || run < best_size)) best = start, best_size = run;
    }
    return best;
  }

  // Opens addresses behind the last block; the first block of a run that is large enough then, or null.
  Block* grow(int64_t size) {
    Block* start = nullptr;
    for (Block* b = last_; b && b->state != State::used; b = b->before) start = b;
    int64_t missing = size - (start ? stats.reserved - start->begin : 0);
    int64_t left = (int64_t)range_size.load() - stats.reserved, more = std::min(up(missing, kGrowth), left);
    if (missing > left) return nullptr;
    char* begin = base_ + stats.reserved;
    // Not MAP_NORESERVE: what malloc would refuse as more than the machine can have is refused here, too.
    if (mprotect(begin, more, PROT_READ | PROT_WRITE) &&
        (shrink(0), mprotect(begin, more = up(missing, kHuge), PROT_READ | PROT_WRITE)))
      return nullptr;
    if (huge_pages) madvise(begin, more, MADV_HUGEPAGE);  // advice: where it is refused, nothing changes
    Block* b = record(stats.reserved, stats.reserved + more, State::used);
    stats.reserved += more;
    if (last_) {
      link_after(last_, b);
    } else {
      first_ = last_ = b;
    }
    put(b, State::cold);
    for (start = last_; start->before && start->before->state != State::used;) start = start->before;
    return start;
  }

  // Makes the start of a run of free blocks one used block. A small rest stays with it: the next tensor there will
  // probably be of this size again.
  void take(Block* b, int64_t size) {
    int64_t end = b->begin + size;
    for (Block* part = b;; part = part->after) {
      if (part->state == State::warm) leave_bin(part);
      if (part->end - end >= std::max(kGranule, size / 16)) {
        Block* rest = cut(part, end);
        if (rest->state == State::warm) enter_bin(rest);
      }
      if (part->state == State::warm) stats.cached -= part->size();
      if (part->end >= end) break;
    }
    b->state = State::used;
    while (b->end < end) absorb_next(b);
  }

  // The whole pages under a warm block, with what a cold neighbour has of the first and last: nobody's either.
  struct Pages {
    int64_t begin, end;
  };
  Pages pages_of(const Block* b) const {
    int64_t begin = down(b->begin, unit()), end = up(b->end, unit());
    auto cold = [](const Block* next) { return next && next->state == State::cold; };
    if (begin < b->begin && !(cold(b->before) && b->before->begin <= begin)) begin += unit();
    if (end > b->end && !(cold(b->after) && b->after->end >= end)) end -= unit();
    return {begin, end};
  }

  // Gives back at least `bytes` of a warm block, or all of its whole pages; whether any.
  bool give_back(Block* b, int64_t bytes) {
    auto [begin, end] = pages_of(b);
    begin = std::max(begin, end - up(bytes, unit()));
    if (madvise(base_ + begin, end - begin, MADV_DONTNEED)) return false;
    leave_bin(b);
    if (b->end > end) enter_bin(cut(b, end));
    if (b->begin < begin) {
      Block* cold = cut(b, begin);
      enter_bin(b);
      b = cold;
    }
    stats.cached -= b->size();
    stats.given_back += b->size();
    put(b, State::cold);
    return true;
  }

  char* base_ = nullptr;
  Block** owners_ = nullptr;  // of used blocks, at the granule that each starts with
  Block *first_ = nullptr, *last_ = nullptr, *spare_ = nullptr;
  Block* bins_[kBins] = {};
  int64_t clock_ = 0;
};

// Never destroyed: tensors are freed until the process has ended.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

int pool_posix_memalign(void** out, size_t alignment, size_t size) {
  if (size >= (size_t)kSmallest && size <= (size_t)INT64_MAX / 2 && alignment <= (size_t)kGranule)
    if (void* data = pool().allocate((int64_t)size)) {
      *out = data;
      return 0;
    }
  return posix_memalign(out, alignment, size);
}

void pool_free(void* data) {
  if (pool_owns(data)) {
    pool().free(data);
  } else {
    std::free(data);
  }
}

}  // namespace

bool pool_owns(const void* data) {
  return (uintptr_t)data - range_begin.load(std::memory_order_relaxed) < range_size.load(std::memory_order_relaxed);
}

const char* pool_on(int64_t limit, bool huge_pages) {
  static const int kept_in_forks =
      pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
  if (kept_in_forks) return "the system does not let forks be prepared for";
  {
    std::lock_guard<std::mutex> lock(pool().mutex);
    if (!pool().reserve()) return "the system does not let 1 GB of addresses be reserved (ulimit -v)";
    pool().limit = limit;
    pool().huge_pages = huge_pages;
    pool().shrink(limit);
  }
  const Import imports[] = {{"posix_memalign", (void*)&pool_posix_memalign}, {"free", (void*)&pool_free}};
  return rebind("libc10.so", imports, 2);
}

void pool_off() {
  // `free` stays bound to the pool: live tensors are still freed through it.
  const Import import{"posix_memalign", (void*)&posix_memalign};
  rebind("libc10.so", &import, 1);
  std::lock_guard<std::mutex> lock(pool().mutex);
  pool().limit = 0;
  pool().shrink(0);
}

int64_t pool_trim() {
  std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().shrink(0);
}

PoolStats pool_stats() {
  std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().stats;
}

}  // namespace bigkernels
