// Routed experts in a run: which rows go to which, and parts of their products.
#pragma once
#include <vector>

#include "program_plan.h"

namespace bigkernels {

// Rows by the experts that they go to, as one thread has them. What a router says that is no expert's number goes
// nowhere.
struct Routes {
  std::vector<int32_t> expert;  // those that have rows, the first one first
  std::vector<int32_t> begin;   // where their pairs begin; one more than there are experts
  std::vector<int32_t> pair;    // row * top + which of the row's
  std::vector<int64_t> ready;   // of an expert: where its rows lie made ready, or -1
  std::vector<int32_t> count;   // of all experts, while they are sorted

  void find(const ExpertsRecord&, const float* chosen, int64_t rows);
};

// What a thread has for experts.
struct ExpertsMemory {
  char *ready, *scratch, *workspace;
  Routes* routes;
};

// Cuts a step, Work::expert_in or expert_out, and says what memory it takes.
struct ExpertsBytes {
  int64_t ready, scratch, workspace;
};
ExpertsBytes cut_experts(const ExpertsRecord&, int64_t width, int64_t threads, Step*);

void prepare_experts(const Step&, float* const* v, const int32_t* width, const ExpertsMemory&);
void make_experts(const Step&, int64_t range, float* const* v, const int32_t* width, const ExpertsMemory&);

}  // namespace bigkernels
