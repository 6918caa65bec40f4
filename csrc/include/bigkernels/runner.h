// Running a step program: torch-free, csrc/cpu/program.cpp. Functions return why they refuse; empty: they did it.
#pragma once
#include <string>

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

class ProgramRun;  // one run: its values, and how far it is

// A run that is ready for its first record. It holds a place that program_finish gives back.
std::string program_start(const RunInput&, ProgramRun**);
// Up to the next call record, whose index it gives, or to the end: -1.
std::string program_step(ProgramRun*, int64_t* stop);
// A value's rows, as float32, between steps: null where the program's own code has no business with it there.
float* program_value(ProgramRun*, int64_t value, bool write, int64_t* rows, int64_t* width);
void program_finish(ProgramRun*);
// A run by its number, which is never given again; null: it has ended.
int64_t program_number(const ProgramRun*);
ProgramRun* program_find(int64_t number);
// Waits until no thread is inside a run that has ended.
void program_settle();

}  // namespace bigkernels
