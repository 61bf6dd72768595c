// Every operation for one instruction level: compiled once for each, with that level's flags and NATIVE_LEVEL.
#include "pack.hpp"
#include "tokens.hpp"

#define JOIN(a, b) a##b
#define NAME(prefix, level) JOIN(prefix, level)

namespace native {
inline namespace NATIVE_LEVEL {
namespace {

int32_t attend_step(const cpmcu_attend_args *base, int32_t ith, int32_t nth, bool merging) {
    const native_attend_args a = attention_of(*base, nth);
    if (merging && a.splits == 1) return 0;
    if (a.shape.dtype == 0) return attend<Float32<Narrow>, Float32<Wide>>(&a, ith, nth, merging), 0;
    if (a.shape.dtype == 1) return attend<Bf16<Narrow>, Bf16<Wide>>(&a, ith, nth, merging), 0;
    return 1;
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
OPERATION(rotate, cpmcu_rotate_args)
OPERATION(lay_out, cpmcu_lay_out_args)
int32_t NAME(cpmcu_attend_, NATIVE_LEVEL)(const cpmcu_attend_args *a, int32_t ith, int32_t nth) { return attend_step(a, ith, nth, false); }
int32_t NAME(cpmcu_merge_, NATIVE_LEVEL)(const cpmcu_attend_args *a, int32_t ith, int32_t nth) { return attend_step(a, ith, nth, true); }
}
