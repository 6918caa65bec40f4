// This level's kernels of the step program.
#include <bigkernels/program.h>
#include <bigkernels/vec.h>

namespace bigkernels {
namespace BK_ISA {

void program_norm(const NormRecord&, float* const*, const int32_t*, int64_t, int64_t);
void program_combine(const CombineRecord&, float* const*, const int32_t*, int64_t, int64_t);
void program_activate(const ActivateRecord&, float* const*, const int32_t*, int64_t, int64_t);
void program_finish(const ProductRecord&, int, const float*, const float*, int64_t, int64_t, float* const*,
                    const int32_t*, int64_t, int64_t);
void program_route(const ExpertsRecord&, float* const*, int64_t, int64_t);
void program_units(const ExpertsRecord&, int64_t, const float*, const float*, int64_t, int64_t, float* const*, int64_t,
                   int64_t);
void program_expert_sum(const ExpertsRecord&, int64_t, const float*, int64_t, int64_t, float* const*, const float*,
                        int64_t, int64_t);
void program_heads(const HeadsRecord&, const Run&, float* const*, const int32_t*, int64_t, int64_t, const Progress*);
AttendPlan program_attend_plan(const AttendRecord&, const Run&, int64_t);
void program_attend(const AttendRecord&, const Run&, const AttendPlan&, int64_t, float* const*, const int32_t*, void*);
void program_attend_merge(const AttendRecord&, const Run&, const AttendPlan&, float* const*, const int32_t*, int64_t,
                          int64_t);
void program_turn(const TurnRecord&, const Run&, float* const*, const int32_t*, int64_t, int64_t);
int64_t program_mix_workspace(const MixRecord&, const Run&);
void program_mix(const MixRecord&, const Run&, float* const*, const int32_t*, int64_t, int64_t, void*);
int32_t product_form(const Weight&, int32_t);
int64_t product_ready(const Weight&, int32_t, int64_t);
void product_prepare(const Weight&, int32_t, const float*, int64_t, int64_t, int64_t, int64_t, void*);
int64_t product_workspace(const Weight&, int32_t, int64_t, int64_t);
void product(const Weight&, int32_t, const void*, int64_t, int64_t, int64_t, float*, int64_t, void*);
int64_t panel_bytes(const Weight&, int32_t);
void make_panels(const Weight&, int64_t, int64_t);

extern const ProgramTable program_table = {
    program_norm,    program_combine,       program_activate, program_finish,      product_form,   product_ready,
    product_prepare, product_workspace,     product,          panel_bytes,         make_panels,    program_route,
    program_units,   program_expert_sum,    program_heads,    program_attend_plan, program_attend, program_attend_merge,
    program_turn,    program_mix_workspace, program_mix,
};

}  // namespace BK_ISA
}  // namespace bigkernels
