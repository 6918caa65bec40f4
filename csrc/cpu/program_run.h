// One run of a program: what it reads and writes, and how a thread makes a part of a step.
#pragma once
#include <bigkernels/runner.h>

#include <atomic>
#include <memory>
#include <vector>

#include "program_experts.h"

namespace bigkernels {

// Memory on a page, kept until more is asked for.
class Block {
 public:
  Block() = default;
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  char* reserve(int64_t bytes);  // what was in it is lost where it has to grow
  void release();
  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

// What a thread has for itself.
struct Worker {
  Block block;
  std::vector<float*> values;  // one before the first, for an attention's state; then all of a run's, with its own
  char *ready = nullptr, *scratch = nullptr, *workspace = nullptr;
  Routes routes;
  ExpertsMemory experts() { return {ready, scratch, workspace, &routes}; }
};

class ProgramRun {
 public:
  std::string start(const RunInput&);
  const Plan& plan() const { return plan_; }
  bool matches(const RunShape& s) const { return plan_.shape == s; }
  float* value(int64_t value, bool write, int64_t* rows, int64_t* width);

  int64_t chunks(const Step& s) const {
    if (s.work != Work::attend && s.work != Work::mix) return s.chunks;
    const int64_t size = chunk_size(s);
    return (units(s) + size - 1) / size;
  }
  // A thread's memory for this run; then a part of a step, and what comes before the parts of one.
  void enter(Worker&) const;
  void prepare(const Step&, Worker&) const;
  void make(const Step&, int64_t chunk, Worker&) const;
  // Asks for the first lines of what a thread reads of the next product.
  void ask_ahead(const Step&, int64_t thread) const;

  // How far the run is. Its own caller moves it over stops; in between, whoever finds that a step is done.
  alignas(64) std::atomic<int64_t> at{0};

  // What threads have taken of a divided step, and made. All words begin with the run's epoch: what an earlier one has
  // left there counts for nothing, and nothing has to be cleared.
  struct alignas(64) Share {
    std::atomic<uint64_t> taken{0};  // epoch, chunks from the back, chunks from the front
    std::atomic<uint64_t> made{0};   // epoch, a bit a chunk
  };
  Share* shares(const Step& s) const { return shares_.get() + s.barrier * plan_.shape.threads; }
  uint32_t epoch() const { return epoch_; }
  // About how long a chunk of a step takes, in nanoseconds.
  std::atomic<int32_t>& typical(const Step& s) const { return typical_[s.barrier]; }
  uint32_t control() const { return control_; }
  int64_t bytes() const { return block_.bytes(); }
  void release() { block_.release(); }

 private:
  // Of a step that every run cuts anew.
  int64_t units(const Step& s) const {
    return s.work == Work::mix ? run_.sequences * s.record->mix.groups : attends_[s.index].chunks;
  }
  int64_t chunk_size(const Step& s) const {
    const int64_t most = kMaxChunks * plan_.shape.threads;
    return s.work == Work::attend || s.work == Work::mix ? (units(s) + most - 1) / most : s.size;
  }
  void copy_input(const RunInput&);
  void make_product(const Step&, int64_t range, Worker&) const;

  Plan plan_;
  Block block_;
  Run run_{};
  const ProgramHeader* header_ = nullptr;
  std::vector<int32_t> width_;
  std::vector<float*> values_;
  std::vector<int64_t> positions_, starts_;
  std::vector<LayerCache> caches_;
  std::vector<int64_t> offsets_, numbers_;
  std::vector<ScoresTable> scores_;
  std::vector<char> angles_[2 * kMaxAngles];
  std::vector<AttendPlan> attends_;
  std::vector<int64_t> states_;  // where in the run's memory they leave their sums
  int64_t workspace_ = 0;
  std::unique_ptr<Share[]> shares_;
  std::unique_ptr<std::atomic<int32_t>[]> typical_;
  uint32_t epoch_ = 0;
  uint32_t control_ = 0;  // of the caller's floating-point unit: threads round as it does
};

}  // namespace bigkernels
