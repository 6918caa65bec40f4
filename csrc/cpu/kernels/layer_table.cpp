// This level's kernels of whole layers.
#include <bigkernels/layers.h>

namespace bigkernels {
namespace BK_ISA {

void activated_linear(const ActivatedLinear&, bool, const void*, int64_t, int64_t, void*);
void activate_fwd(const Activate&, int64_t, int64_t);
void activate_bwd(const Activate&, int64_t, int64_t);
void norm_run_moments(const ChannelNorm&, int64_t, int64_t, double*);
void norm_rows_moments(const ChannelNorm&, int64_t, int64_t, float*, double*);
void norm_run_bwd_sums(const ChannelNorm&, int64_t, int64_t, double*);
void norm_rows_bwd_sums(const ChannelNorm&, int64_t, int64_t, float*, double*);
void norm_run(const ChannelNorm&, int64_t, int64_t);
void norm_rows(const ChannelNorm&, int64_t, int64_t);
void norm_run_bwd(const ChannelNorm&, int64_t, int64_t);
void norm_rows_bwd(const ChannelNorm&, int64_t, int64_t);

extern const LayerTable layer_table = {
    activated_linear,   activate_fwd, activate_bwd, norm_run_moments, norm_rows_moments, norm_run_bwd_sums,
    norm_rows_bwd_sums, norm_run,     norm_rows,    norm_run_bwd,     norm_rows_bwd,
};

}  // namespace BK_ISA
}  // namespace bigkernels
