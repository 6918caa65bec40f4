// How a program is cut for runs of one shape: what its records do, in steps, who makes which part, and where values
// lie.
#pragma once
#include <bigkernels/program.h>

#include <string>
#include <vector>

namespace bigkernels {

struct RunShape {
  int64_t id, batch, tokens, keep, threads;
  bool operator==(const RunShape& o) const {
    return id == o.id && batch == o.batch && tokens == o.tokens && keep == o.keep && threads == o.threads;
  }
};

enum class Work : int32_t {
  rows,      // a row record, by rows
  elements,  // combine and activate, by elements
  prepare,   // tokens made ready for a product, by rows
  product,
  attend,
  merge,
  route,      // experts: which tokens go where
  expert_in,  // their gates and ups
  expert_out,
  call,  // a stop
  mix,   // attention inside of sequences, by sequences and groups
};

struct Step {
  const Record* record;
  Work work;
  bool own;                                       // every thread runs all of it for itself, and none waits for others
  bool prepares;                                  // a product of few tokens: every thread makes them ready for itself
  int32_t index;                                  // of the record in its program; attend, merge: of its AttendPlan
  int64_t m;                                      // rows
  int64_t count;                                  // rows, elements or ranges of rows that there are
  int64_t size;                                   // of a chunk
  int32_t chunks;                                 // 0 for attend and mix, which every run cuts anew
  int32_t barrier;                                // its number among the divided steps
  int32_t product;                                // the step of the product that comes next; -1: none
  int32_t cut[kMaxWeights], ranges[kMaxWeights];  // product: rows of a range, and ranges, of each weight
  int64_t ready[kMaxWeights];                     // where tokens lie made ready for a weight; the same for one form
  bool first[kMaxWeights];                        // of its form
};

struct Plan {
  RunShape shape{};
  // Values lie each in a place of its own, and what is late is made again; else places are used again, and threads
  // wait for what others have begun.
  bool help = false;
  std::vector<Step> steps;
  std::vector<int64_t>
      place;  // of values, in bytes: in the run's memory, or ~place in each thread's own; none: kNowhere
  std::vector<int64_t> rows;  // of values
  std::vector<const AttendRecord*> attends;
  std::vector<const MixRecord*> mixes;
  int32_t barriers = 0;
  std::vector<int32_t> rotary;                               // columns of each angle table that are read
  int64_t shared = 0;                                        // bytes of the run's memory
  int64_t owned = 0, ready = 0, scratch = 0, workspace = 0;  // of each thread's
};
constexpr int64_t kNowhere = INT64_MIN;

// Why a program cannot run; empty: it can.
std::string make_plan(const ProgramHeader&, const RunShape&, Plan*);

constexpr int kMaxThreads = 256;
constexpr int kMaxChunks = 32;  // of a step, a thread
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace bigkernels
