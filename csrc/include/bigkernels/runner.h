// Running a step program: torch-free, csrc/cpu/program*.cpp.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "program.h"

namespace bigkernels {

// What a caller has for a run. It is copied: nothing of it is read after the call, but what its addresses point to.
struct RunInput {
  const ProgramHeader* program;
  Run run;
  int64_t threads;
  const void* hidden;  // (rows, width) contiguous
  Type hidden_type;
};

struct Place;  // where a run is: its values, and how far it is

// A run that is ready for its first record, to be given back by program_finish; or why there is none.
std::string program_start(const RunInput&, Place**);
// Up to the next call record, whose index it gives, or to the end: -1.
int64_t program_step(Place*);
// A value's rows, as float32, at a stop or at the end: null where the model's own code has no business with it.
float* program_value(Place*, int64_t value, bool write, int64_t* rows, int64_t* width);
void program_finish(Place*);
// A run by its number, which is never given again; null: it has ended.
int64_t program_number(const Place*);
Place* program_find(int64_t number);
// Panels of the weights of a program that has not run yet: how many bytes they take, all of them, in the order in which
// a step reads them; and where there is memory for them, their addresses in the records, and `weights` to be filled by
// ProgramTable::make_panels.
int64_t program_panels(ProgramHeader*, uint8_t* memory, std::vector<const Weight*>* weights);
// Waits until no thread is inside a run that has ended.
void program_settle();
// Bytes of values that runs have left for the next ones; frees them, and returns how many.
int64_t program_kept();
int64_t program_release();
// For tests: makes threads pause at random, about once in so many places where they might lose their core, 0 never;
// returns how many chunks have been taken over from others, and made again, since the last call.
std::pair<int64_t, int64_t> program_delays(int64_t every);

}  // namespace bigkernels
