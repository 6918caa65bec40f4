// One run of a program: what it reads and writes, and how a thread makes a part of a step.
#pragma once
#include <bigkernels/runner.h>

#include <atomic>
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
  std::vector<float*> values;  // all of a run's, with this thread's own
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

  int64_t chunks(const Step& s) const { return s.work == Work::attend ? pieces(s) : s.chunks; }
  // A thread's memory for this run; then a part of a step, and what comes before the parts of one.
  void enter(Worker&) const;
  void prepare(const Step&, Worker&) const;
  void make(const Step&, int64_t chunk, Worker&) const;

  int64_t at = 0;      // the step that comes next
  bool held = false;   // by a caller
  int64_t number = 0;  // of what it is held for
  int64_t bytes() const { return block_.bytes(); }
  void release() { block_.release(); }

 private:
  int64_t pieces(const Step& s) const {
    const AttendPlan& p = attends_[s.index];
    return p.chunks;
  }
  void copy_input(const RunInput&);
  void make_product(const Step&, int64_t piece, Worker&) const;

  Plan plan_;
  Block block_;
  Run run_{};
  const ProgramHeader* header_ = nullptr;
  std::vector<int32_t> width_;
  std::vector<float*> values_;
  std::vector<int64_t> positions_, starts_;
  std::vector<LayerCache> caches_;
  std::vector<char> angles_[2 * kMaxAngles];
  std::vector<AttendPlan> attends_;
  int64_t workspace_ = 0;
};

}  // namespace bigkernels
