#pragma once
#include "program_plan.h"

namespace bigkernels {

// Why a program is none, or why a run does not fit it; empty: all that can be checked is right. `rows`: of each value,
// 0 where nothing makes it.
std::string check_program(const ProgramHeader&, const RunShape&, std::vector<int64_t>* rows);
std::string check_run(const ProgramHeader&, const Run&, const std::vector<int32_t>& rotary);

}  // namespace bigkernels
