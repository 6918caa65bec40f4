// The threads of step programs: one team for the process, beside torch's own.
#pragma once
#include "program_run.h"

namespace bigkernels {

// A run and its caller's memory. Places are used again and never freed: a thread that lost its core may be inside one
// long after its call has returned, and until it leaves, the place is not used.
struct Place {
  ProgramRun run;
  Worker worker;
  std::atomic<bool> held{false};  // by a caller, from program_start to program_finish
  int64_t number = 0;             // of what it is held for
  int64_t stop = -1;              // the step at which the caller was last given the run
};

// Steps up to `end` by the calling thread, with the team where no other call has it.
void run_steps(Place*, int64_t end);
// Whether one of the team's threads is inside.
bool is_occupied(const Place*);
// Waits until no thread is inside a place that nobody holds.
void settle_team();

// Makes the team's threads pause at random, about once in `every` places where they might lose their core; 0: never.
void delay_team(int64_t every);
struct TeamCounts {
  std::atomic<int64_t> taken_over{0}, made_again{0};
};
extern TeamCounts team_counts;

}  // namespace bigkernels
