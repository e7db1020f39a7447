// The kernels of every op for one type, KERNEL_TYPE, as tests/ptx/ compiles them: instantiating the functions that launch
// them instantiates them all, so that a new kernel needs no line here, and a new op two.
//
//   nvcc -ptx -std=c++20 -arch=compute_90 -DKERNEL_TYPE=float -I csrc tests/ptx/kernels.cu
#include "cuda/competitors.cuh"
#include "cuda/deepfool_step.cuh"
#include "cuda/dual_norm.cuh"
#include "cuda/margin_hinge.cuh"
#include "cuda/one_to_n.cuh"
#include "cuda/row_distance.cuh"

namespace margin_kernels::cuda {

using T = KERNEL_TYPE;
using acc = acc_t<T>;

template void competitors_forward(const Launch&, const CompetitorsIn<T>&, const CompetitorsPart<acc>&);
template void competitors_backward(const Launch&, const CompetitorsBackwardIn<T>&);

template void dual_norm_forward<T>(const Launch&, const NormPlan&, double, acc*, Partial*);
template void dual_norm_backward<T>(const Launch&, const NormPlan&, double, const acc*, const acc*, int64_t*);

template void row_distance_forward(const Launch&, const RowPairs<T>&, double, acc*);
template void row_distance_backward(const Launch&, const RowPairs<T>&, double, const RowUses<T>&, const acc*,
                                    const acc*, int64_t*);

template void margin_hinge_forward(const Launch&, const MarginHinge<acc>&, acc*, acc*);
template void margin_hinge_backward(const Launch&, const MarginHinge<acc>&, const acc*, acc*, acc*);

template void one_to_n_forward(const Launch&, const OneToN<T>&, bool, LogSum<acc>*, acc*, acc*, acc*);
template void one_to_n_backward(const Launch&, const OneToN<T>&, bool, const acc*, const acc*, const acc*,
                                SampleSlope<acc>*, double*, LogSum<acc>*, T*);

template void deepfool_step_forward(const Launch&, const DeepFool<T>&, double, T*, acc*, int64_t*, acc*, int64_t*);
template void deepfool_step_backward(const Launch&, const DeepFool<T>&, double, const int64_t*, const acc*, const T*,
                                     const acc*, double*, int64_t*, acc*, T*);

}  // namespace margin_kernels::cuda
