// Torch's OpenMP threads spin for milliseconds after each parallel region, such as the one that converts a token's
// logits, as long as the process has no more of them than cores: they would sit on the cores of a program's team. A
// second pool of them, which does nothing, makes their runtime count more threads than cores, and they sleep after some
// microseconds. It belongs to a thread that ends, and the pool with it, a second after the last call.
#include <bigkernels/stable.h>

#include <chrono>
#include <mutex>
#include <thread>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "../own_thread.h"
#include "program_neighbours.h"

namespace bigkernels {
namespace {

constexpr int64_t kKeep = 1000;  // milliseconds

int64_t now() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

struct Neighbours {
  std::mutex mutex;
  std::atomic<bool> there{false};
  std::atomic<int64_t> called{0};

  void stay(int64_t threads) {
    torch::stable::parallel_for(0, threads, 1, [](int64_t, int64_t) {});
    for (;;) {
      std::this_thread::sleep_for(std::chrono::milliseconds(kKeep / 4));
      if (now() - called.load(std::memory_order_relaxed) < kKeep) continue;
      std::lock_guard<std::mutex> lock(mutex);
      there.store(false, std::memory_order_relaxed);
      return;
    }
  }
  void start(int64_t threads) {
    std::lock_guard<std::mutex> lock(mutex);
    if (there.load(std::memory_order_relaxed)) return;
    there.store(true, std::memory_order_relaxed);
    if (!start_own_thread([this, threads] { stay(threads); })) there.store(false, std::memory_order_relaxed);
  }
};

// Never destroyed: its thread ends with the process, after it would be.
Neighbours& neighbours() {
  static Neighbours* const instance = [] {
    auto n = new Neighbours;
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork([] { neighbours().mutex.lock(); }, [] { neighbours().mutex.unlock(); },
                   [] {
                     neighbours().there.store(false, std::memory_order_relaxed);
                     neighbours().mutex.unlock();
                   });
#endif
    return n;
  }();
  return *instance;
}

}  // namespace

void calm_neighbours(int64_t threads) {
  if (threads < 2) return;
  Neighbours& n = neighbours();
  n.called.store(now(), std::memory_order_relaxed);
  if (!n.there.load(std::memory_order_relaxed)) n.start(threads);
}

}  // namespace bigkernels
