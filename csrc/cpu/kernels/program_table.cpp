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

extern const ProgramTable program_table = {
    program_norm, program_combine, program_activate, program_finish,
    nullptr,  // product_form
    nullptr,  // product_ready
    nullptr,  // product_prepare
    nullptr,  // product_workspace
    nullptr,  // product
    nullptr,  // heads
    nullptr,  // attend_plan
    nullptr,  // attend
    nullptr,  // attend_merge
};

}  // namespace BK_ISA
}  // namespace bigkernels
