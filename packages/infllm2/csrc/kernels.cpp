// Every operation for one instruction level: compiled once for each, with that level's flags and NATIVE_LEVEL.
#include "backward.hpp"
#include "compress.hpp"
#include "run.hpp"

#define JOIN(a, b) a##b
#define NAME(prefix, level) JOIN(prefix, level)

namespace native {
inline namespace NATIVE_LEVEL {
namespace {

// Few rows leave half of a wide vector idle, and then the narrow one takes half the time: all come in both.
template <class Run> int32_t dispatch(const infllm2_shape &s, int64_t tile, Run run) {
    if (tile < 1 || tile > MOST_TOKENS || (tile > 1 && tile * s.group > MOST_ROWS)) return 2;
    if (s.dtype == 0) return run(Float32<Narrow>(), Float32<Wide>()), 0;
    if (s.dtype == 1) return run(Bf16<Narrow>(), Bf16<Wide>()), 0;
    return 1;
}

}  // namespace
}  // namespace NATIVE_LEVEL
}  // namespace native

using namespace native;

#define N decltype(narrow)
#define W decltype(wide)

extern "C" {

int32_t NAME(infllm2_select_, NATIVE_LEVEL)(const infllm2_select_args *a, int32_t ith, int32_t nth) {
    return dispatch(a->shape, 1, [&](auto narrow, auto wide) { select<N, W>(a, ith, nth); });
}

int32_t NAME(infllm2_attend_, NATIVE_LEVEL)(const infllm2_attend_args *a, int32_t ith, int32_t nth) {
    return dispatch(a->shape, a->tile, [&](auto narrow, auto wide) { attend<N, W>(a, ith, nth, false); });
}

int32_t NAME(infllm2_merge_, NATIVE_LEVEL)(const infllm2_attend_args *a, int32_t ith, int32_t nth) {
    return dispatch(a->shape, a->tile, [&](auto narrow, auto wide) { attend<N, W>(a, ith, nth, true); });
}

int32_t NAME(infllm2_run_, NATIVE_LEVEL)(const infllm2_run_args *a, int32_t ith, int32_t nth) {
    return dispatch(a->attend.shape, a->attend.tile, [&](auto narrow, auto wide) { run<N, W>(a, ith, nth); });
}

int32_t NAME(infllm2_backward_, NATIVE_LEVEL)(const infllm2_backward_args *a, int32_t ith, int32_t nth) {
    return dispatch(a->attend.shape, a->attend.tile, [&](auto narrow, auto wide) { backward<N, W>(a, ith, nth); });
}

int32_t NAME(infllm2_gather_, NATIVE_LEVEL)(const infllm2_backward_args *a, int32_t ith, int32_t nth) {
    return dispatch(a->attend.shape, a->attend.tile, [&](auto, auto wide) { gather<W>(a, ith, nth); });
}

int32_t NAME(infllm2_compress_, NATIVE_LEVEL)(const infllm2_compress_args *a, int32_t ith, int32_t nth) {
    infllm2_shape shape = {};
    shape.dtype = a->dtype;
    return dispatch(shape, 1, [&](auto, auto wide) { compress<W>(a, ith, nth); });
}
}
