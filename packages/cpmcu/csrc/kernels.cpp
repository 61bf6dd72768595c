// Every operation for one instruction level: compiled once for each, with that level's flags and NATIVE_LEVEL.
#include "lay_out.hpp"
#include "tokens.hpp"

#define JOIN(a, b) a##b
#define NAME(prefix, level) JOIN(prefix, level)

namespace native {
inline namespace NATIVE_LEVEL {
namespace {

template <class Run> int32_t with_formats(int32_t dtype, int32_t int8, Run run) {
    if (dtype != 0 && dtype != 1) return 1;
    if (int8)
        dtype ? run(Bf16OfInt8<Narrow>(), Bf16OfInt8<Wide>()) : run(Float32OfInt8<Narrow>(), Float32OfInt8<Wide>());
    else
        dtype ? run(Bf16<Narrow>(), Bf16<Wide>()) : run(Float32<Narrow>(), Float32<Wide>());
    return 0;
}

}  // namespace
}  // namespace NATIVE_LEVEL
}  // namespace native

using namespace native;

#define OPERATION(name, args) \
    int32_t NAME(cpmcu_##name##_, NATIVE_LEVEL)(const args *a, int32_t ith, int32_t nth) { return name(*a, ith, nth); }

extern "C" {
OPERATION(embed, cpmcu_embed_args)
OPERATION(norm, cpmcu_norm_args)
OPERATION(pack, cpmcu_pack_args)
OPERATION(swiglu, cpmcu_swiglu_args)
OPERATION(multiply, cpmcu_multiply_args)
OPERATION(add, cpmcu_add_args)
OPERATION(rotate, cpmcu_rotate_args)
OPERATION(lay_out, cpmcu_lay_out_args)

#define N decltype(narrow)
#define W decltype(wide)
int32_t NAME(cpmcu_compress_, NATIVE_LEVEL)(const cpmcu_compress_args *a, int32_t ith, int32_t nth) {
    return with_formats(a->compress.dtype, a->compress.int8, [&](auto, auto wide) { compress_new<W>(*a, ith, nth); });
}
int32_t NAME(cpmcu_select_, NATIVE_LEVEL)(const cpmcu_attend_args *a, int32_t ith, int32_t nth) {
    return with_formats(a->attend.shape.dtype, a->attend.shape.int8, [&](auto narrow, auto wide) { choose_blocks<N, W>(*a, ith, nth); });
}
int32_t NAME(cpmcu_attend_, NATIVE_LEVEL)(const cpmcu_attend_args *a, int32_t ith, int32_t nth) {
    return with_formats(a->attend.shape.dtype, a->attend.shape.int8, [&](auto narrow, auto wide) { attend_step<N, W>(*a, ith, nth); });
}
int32_t NAME(cpmcu_merge_, NATIVE_LEVEL)(const cpmcu_attend_args *a, int32_t ith, int32_t nth) {
    return with_formats(a->attend.shape.dtype, a->attend.shape.int8, [&](auto narrow, auto wide) { merge_step<N, W>(*a, ith, nth); });
}
}
