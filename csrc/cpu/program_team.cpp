// How threads share a run.
//
// A divided step is cut in chunks, and each thread has its share of them, the same rows of a weight in every run: first
// its own, in their order, which makes reading weights one stream; then what others have not begun. What is begun and
// not done belongs to a thread that may have lost its core, for as long as the system likes, milliseconds: after some
// microseconds of waiting it is made again. Every step writes where no other step does, so a thread that wakes up late
// writes the bits that are there. A step is done when all chunks have been made, by whomever; whoever sees it moves the
// run on, and a thread that comes behind goes on from there. So no thread ever waits for another one's core, and a call
// returns as soon as its caller sees the last step done.
//
// What comes of it: (1) a call's inputs are copied, and its values belong to a place that no call gets while a thread
// is inside; (2) what a run points to (weights, caches, records) may be read, and the cache written, until
// `settle_team`; (3) steps that threads run for themselves (`Step::own`) may be behind as well, and write the same
// bits, too.
//
// With many tokens values would not fit the caches, and places are used again within a run: there a thread waits for
// chunks that others have begun, and the call for all that are inside (Plan::help is false).
//
// Memory order: chunks are marked as made by a release, and whoever moves the run on has seen all marks of the step by
// acquires; ProgramRun::at is only changed by read-modify-writes that release, and read by acquires. So a thread that
// sees a step passed sees all that was made in it, transitively.
#include "program_team.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "own_thread.h"

namespace bigkernels {

TeamCounts team_counts;

namespace {

constexpr int64_t kSpin = 50000;   // nanoseconds between calls, after which threads sleep
constexpr int64_t kLeast = 3000;   // what is waited for a chunk that another thread has begun
constexpr int64_t kFirst = 20000;  // the same where nobody knows how long it takes
constexpr int64_t kLeave = 5000;   // with help: what a call that is done waits for others to leave
constexpr int64_t kYield = 20000;  // without help: after which waiting threads let others run
constexpr int kWakes = 8;          // threads that one wakes

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// ---- random delays, for tests
// -----------------------------------------------------------------------------------------

std::atomic<int64_t> delay_every{0};

__attribute__((noinline)) void delay(int64_t every) {
  static thread_local uint64_t state = 0x9e3779b97f4a7c15u ^ (uint64_t)(uintptr_t)&state;
  state = state * 6364136223846793005u + 1442695040888963407u;
  const uint64_t random = state >> 33;
  if (random % (uint64_t)every) return;
  const int64_t kind = (random / every) % 4;
  if (kind == 0) return std::this_thread::yield();
  std::this_thread::sleep_for(std::chrono::microseconds(kind == 1 ? 5 : kind == 2 ? 50 : 400));
}
inline void maybe_delay() {
  const int64_t every = delay_every.load(std::memory_order_relaxed);
  if (__builtin_expect(every != 0, 0)) delay(every);
}

// ---- one thread's walk
// ------------------------------------------------------------------------------------------------

class Walk {
 public:
  Walk(ProgramRun* run, Worker* worker, int64_t thread)
      : run_(*run), worker_(*worker), plan_(run->plan()), me_(thread), threads_(plan_.shape.threads) {
    run_.enter(worker_);
  }

  // Until the run has come to step `end`.
  void to(int64_t end) {
    int64_t i = run_.at.load(std::memory_order_acquire);
    while (i < end) {
      const Step& s = plan_.steps[i];
      if (s.own) {
        maybe_delay();
        run_.make(s, 0, worker_);
        ++i;
        continue;
      }
      i = std::max(i, run_.at.load(std::memory_order_acquire));
      if (i >= end || &plan_.steps[i] != &s) continue;
      divided(s, i);
      pass(i + 1);
      ++i;
    }
    pass(end);
  }

 private:
  bool passed(int64_t i) const { return run_.at.load(std::memory_order_acquire) > i; }
  void pass(int64_t to) {
    int64_t at = run_.at.load(std::memory_order_acquire);
    while (at < to && !run_.at.compare_exchange_weak(at, to, std::memory_order_acq_rel)) {
    }
  }

  void divided(const Step& s, int64_t i) {
    maybe_delay();
    run_.prepare(s, worker_);
    const int64_t n = run_.chunks(s);
    if (threads_ == 1) {
      for (int64_t c = 0; c < n; ++c) run_.make(s, c, worker_);
      run_.ask_ahead(s, 0);
      return;
    }
    ProgramRun::Share* shares = run_.shares(s);
    std::atomic<int32_t>& typical = run_.typical(s);
    const int64_t start = now();
    int64_t computed = 0;
    for (int64_t k = 0; k < threads_; ++k) {  // the thread's own share first
      const int64_t owner = me_ + k < threads_ ? me_ + k : me_ + k - threads_;
      const int64_t begin = n * owner / threads_, count = n * (owner + 1) / threads_ - begin;
      for (int64_t c; (c = take(shares[owner], count, k > 0)) >= 0; ++computed) {
        maybe_delay();
        run_.make(s, begin + c, worker_);
        maybe_delay();
        mark(shares[owner], c);
        if (k) team_counts.taken_over.fetch_add(1, std::memory_order_relaxed);
        if (passed(i)) return;
      }
    }
    run_.ask_ahead(s, me_);
    const int64_t time = now();
    if (computed) learn(typical, (time - start) / computed);
    const int64_t known = typical.load(std::memory_order_relaxed);
    wait(s, i, n, shares, time + (known ? std::max(kLeast, 2 * known) : kFirst));
  }

  // The mean time of a chunk: shorter ones are believed, longer ones little by little, because the thread may have lost
  // its core meanwhile.
  static void learn(std::atomic<int32_t>& typical, int64_t time) {
    const int64_t old = typical.load(std::memory_order_relaxed);
    const int64_t most = old ? old + old / 8 + 1 : kFirst;
    typical.store((int32_t)std::min(time, most), std::memory_order_relaxed);
  }

  // The next chunk of a share, from its front, or from its back; -1: all are taken.
  int64_t take(ProgramRun::Share& share, int64_t count, bool back) const {
    const uint64_t base = (uint64_t)run_.epoch() << 32;
    uint64_t old = share.taken.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t word = old >> 32 == run_.epoch() ? old : base;
      const int64_t from_back = word >> 16 & 0xffff, from_front = word & 0xffff;
      if (from_back + from_front >= count) return -1;
      // No order is needed: who takes a chunk reads what was made in steps before, which it has seen passed.
      if (share.taken.compare_exchange_weak(old, word + (back ? 0x10000 : 1), std::memory_order_relaxed))
        return back ? count - 1 - from_back : from_front;
    }
  }

  void mark(ProgramRun::Share& share, int64_t chunk) const {
    const uint64_t base = (uint64_t)run_.epoch() << 32, bit = uint64_t{1} << chunk;
    uint64_t old = share.made.load(std::memory_order_relaxed);
    while (!share.made.compare_exchange_weak(old, (old >> 32 == run_.epoch() ? old : base) | bit,
                                             std::memory_order_release, std::memory_order_relaxed)) {
    }
  }
  // Bits of the chunks of a share that are not made.
  uint64_t missing(const ProgramRun::Share& share, int64_t count) const {
    const uint64_t word = share.made.load(std::memory_order_acquire);
    const uint64_t all = (uint64_t{1} << count) - 1;
    return all & ~(word >> 32 == run_.epoch() ? word : 0);
  }
  bool all_made(const ProgramRun::Share* shares, int64_t n) const {
    for (int64_t o = 0; o < threads_; ++o)
      if (missing(shares[o], n * (o + 1) / threads_ - n * o / threads_)) return false;
    return true;
  }

  // All chunks are taken: until all are made, or, with help, so long and then they are made again.
  void wait(const Step& s, int64_t i, int64_t n, ProgramRun::Share* shares, int64_t until) {
    const int64_t yield_from = now() + kYield;
    for (int spins = 1; !passed(i) && !all_made(shares, n); ++spins) {
      pause();
      if (spins % 16) continue;
      const int64_t time = now();
      if (plan_.help && time > until) break;
      if (!plan_.help && time > yield_from) std::this_thread::yield();
    }
    if (!plan_.help) return;
    for (int64_t k = threads_ - 1; k >= 0; --k) {
      const int64_t owner = me_ + k < threads_ ? me_ + k : me_ + k - threads_;
      const int64_t begin = n * owner / threads_, count = n * (owner + 1) / threads_ - begin;
      for (int64_t c = count - 1; c >= 0; --c) {
        if (!(missing(shares[owner], count) >> c & 1)) continue;
        if (passed(i)) return;
        maybe_delay();
        run_.make(s, begin + c, worker_);
        mark(shares[owner], c);
        team_counts.made_again.fetch_add(1, std::memory_order_relaxed);
      }
    }
  }

  ProgramRun& run_;
  Worker& worker_;
  const Plan& plan_;
  const int64_t me_, threads_;
};

// ---- the team
// ---------------------------------------------------------------------------------------------------------

struct alignas(64) Member {
  std::atomic<Place*> inside{nullptr};
  std::atomic<bool> asleep{false};
  std::mutex mutex;
  std::condition_variable wake;
  Worker worker;
};

// A call that may be joined: its number, and the threads it has, so that others sleep on.
constexpr uint64_t ticket_of(uint64_t number, int64_t threads) { return number << 16 | (uint64_t)threads; }
constexpr int64_t threads_of(uint64_t ticket) { return (int64_t)(ticket & 0xffff); }

class Team {
 public:
  void run(Place* place, int64_t end) {
    const int64_t threads = place->run.plan().shape.threads;
    Walk walk(&place->run, &place->worker, 0);
    // A second caller has all chunks to itself.
    std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
    if (threads == 1 || !lock.try_lock()) return walk.to(end);
    grow(threads);
    end_.store(end, std::memory_order_release);
    place_.store(place, std::memory_order_release);
    const uint64_t ticket = ticket_of(++number_, threads);
    ticket_.store(ticket, std::memory_order_seq_cst);
    wake(0, threads);
    walk.to(end);
    // From here on nobody enters: a thread says that it is inside, then looks whether the call is still there, and this
    // looks the other way round.
    ticket_.store(0, std::memory_order_seq_cst);
    // Who has its core is out in a moment, and the next call finds this place, in the caches.
    const bool help = place->run.plan().help;
    const int64_t start = now();
    while (occupied(place)) {
      const int64_t time = now() - start;
      if (help && time > kLeave) break;
      !help&& time > kYield ? std::this_thread::yield() : pause();
    }
  }

  bool occupied(const Place* place) const {
    const int count = count_.load(std::memory_order_acquire);
    for (int t = 1; t < count; ++t)
      if (members_[t]->inside.load(std::memory_order_seq_cst) == place) return true;
    return false;
  }

  void settle() const {
    const int count = count_.load(std::memory_order_acquire);
    for (int t = 1; t < count; ++t)
      for (Place* p; (p = members_[t]->inside.load(std::memory_order_seq_cst)) && !p->held.load();)
        std::this_thread::yield();
  }

  void before_fork() { mutex_.lock(); }
  void after_fork(bool child) {
    if (child) {
      // The threads are not there. Their memory is left behind: whatever state it was in, nobody touches it again.
      for (int t = 1; t < count_.load(std::memory_order_relaxed); ++t) members_[t] = nullptr;
      count_.store(1, std::memory_order_relaxed);
      ticket_.store(0, std::memory_order_relaxed);
    }
    mutex_.unlock();
  }

 private:
  void grow(int64_t threads) {
    int count = count_.load(std::memory_order_relaxed);
    for (; count < threads; ++count) {
      members_[count] = new Member;
      if (!start_own_thread(
              [this, count, member = members_[count]] { work(member, count); })) {  // as many as there are
        delete members_[count];
        members_[count] = nullptr;
        break;
      }
      count_.store(count + 1, std::memory_order_release);
    }
  }

  // Thread 0 wakes the first few, and each of these some more.
  void wake(int64_t thread, int64_t threads) {
    const int64_t known = std::min<int64_t>(threads, count_.load(std::memory_order_acquire));
    for (int64_t t = thread * kWakes + 1; t <= thread * kWakes + kWakes && t < known; ++t) {
      Member& m = *members_[t];
      if (!m.asleep.load(std::memory_order_seq_cst)) continue;
      std::lock_guard<std::mutex> lock(m.mutex);
      m.asleep.store(false, std::memory_order_relaxed);
      m.wake.notify_one();
    }
  }

  void work(Member* m, int thread) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "bigkernels");
#endif
    uint64_t seen = 0;
    for (;;) {
      const uint64_t ticket = next(m, thread, seen);
      seen = ticket;
      wake(thread, threads_of(ticket));
      // If one of these is of a later call, its store comes after the end of this one, which the next look then sees.
      const int64_t end = end_.load(std::memory_order_acquire);
      Place* place = place_.load(std::memory_order_acquire);
      m->inside.store(place, std::memory_order_seq_cst);
      if (ticket_.load(std::memory_order_seq_cst) == ticket) {
        maybe_delay();
#if defined(__SSE2__)
        _mm_setcsr(place->run.control());
#endif
        try {
          Walk(&place->run, &m->worker, thread).to(end);
        } catch (const std::bad_alloc&) {  // for its workspace: it has taken nothing yet, and the others do all
        }
      }
      m->inside.store(nullptr, std::memory_order_release);
    }
  }

  // A call that is not the last one seen, and has work for this thread.
  uint64_t next(Member* m, int thread, uint64_t seen) {
    const int64_t start = now();
    for (int spins = 1;; ++spins) {
      const uint64_t ticket = ticket_.load(std::memory_order_seq_cst);
      if (ticket && ticket != seen && thread < threads_of(ticket)) return ticket;
      pause();
      if (spins % 32 == 0 && now() - start > kSpin) break;
    }
    std::unique_lock<std::mutex> lock(m->mutex);
    for (;;) {
      m->asleep.store(true, std::memory_order_seq_cst);
      const uint64_t ticket = ticket_.load(std::memory_order_seq_cst);
      if (ticket && ticket != seen && thread < threads_of(ticket)) {
        m->asleep.store(false, std::memory_order_relaxed);
        return ticket;
      }
      m->wake.wait(lock, [m] { return !m->asleep.load(std::memory_order_relaxed); });
    }
  }

  std::mutex mutex_;                             // held by the caller whose call the team works on
  alignas(64) std::atomic<uint64_t> ticket_{0};  // 0: no call
  std::atomic<Place*> place_{nullptr};
  std::atomic<int64_t> end_{0};
  uint64_t number_ = 0;
  std::atomic<int> count_{1};
  Member* members_[kMaxThreads] = {};
};

// Never destroyed: threads end with the process, after it would be.
Team& team() {
  static Team* const instance = [] {
    auto t = new Team;
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork([] { team().before_fork(); }, [] { team().after_fork(false); }, [] { team().after_fork(true); });
#endif
    return t;
  }();
  return *instance;
}

}  // namespace

void run_steps(Place* place, int64_t end) { team().run(place, end); }
bool is_occupied(const Place* place) { return team().occupied(place); }
void settle_team() { team().settle(); }
void delay_team(int64_t every) { delay_every.store(every, std::memory_order_relaxed); }

}  // namespace bigkernels
