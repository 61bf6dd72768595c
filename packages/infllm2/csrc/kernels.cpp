// Every operation for one instruction level: compiled once for each, with that level's flags and NATIVE_LEVEL.
#include "run.hpp"

#define JOIN(a, b) a##b
#define NAME(prefix, level) JOIN(prefix, level)

namespace native {
inline namespace NATIVE_LEVEL {
namespace {

#if defined(__AVX512F__)
using Wide = Zmm;
using Narrow = Ymm;
#elif defined(__AVX2__)
using Wide = Ymm;
using Narrow = Ymm;
#else
using Wide = Plain<8>;
using Narrow = Plain<8>;
#endif
#if defined(__AVX512BF16__)
template <class V> using Bf16 = Bf16Pairs<V>;
#else
template <class V> using Bf16 = Bf16Widened<V>;
#endif

// Few rows leave half of a wide vector idle: then the narrow one takes half the time.
template <class Run> int32_t dispatch(const infllm2_shape &s, int64_t rows, Run run) {
    if (s.dtype == 0) return rows <= Narrow::L ? run(Float32<Narrow>()) : run(Float32<Wide>());
    if (s.dtype == 1) return rows <= Narrow::L ? run(Bf16<Narrow>()) : run(Bf16<Wide>());
    return 1;
}

}  // namespace
}  // namespace NATIVE_LEVEL
}  // namespace native

using namespace native;

extern "C" {

int32_t NAME(infllm2_select_, NATIVE_LEVEL)(const infllm2_select_args *a, int32_t ith, int32_t nth) {
    return dispatch(a->shape, select_tokens(&a->shape) * a->shape.group, [&](auto format) {
        return select<decltype(format)>(a, ith, nth), 0;
    });
}

int32_t NAME(infllm2_attend_, NATIVE_LEVEL)(const infllm2_attend_args *a, int32_t ith, int32_t nth) {
    return dispatch(a->shape, tokens_at_once(a) * a->shape.group, [&](auto format) {
        return attend<decltype(format)>(a, ith, nth), 0;
    });
}

int32_t NAME(infllm2_merge_, NATIVE_LEVEL)(const infllm2_attend_args *a, int32_t ith, int32_t nth) {
    return dispatch(a->shape, tokens_at_once(a) * a->shape.group, [&](auto format) {
        return merge<decltype(format)>(a, ith, nth), 0;
    });
}

int32_t NAME(infllm2_run_, NATIVE_LEVEL)(const infllm2_run_args *a, int32_t ith, int32_t nth) {
    return dispatch(a->attend.shape, a->attend.shape.group, [&](auto format) {
        return run<decltype(format)>(a, ith, nth), 0;
    });
}
}
