// Selection and attention of each query in one go, so that the list of blocks never leaves the near cache.
#pragma once
#include "attend.hpp"
#include "select.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

template <class Format> void run(const infllm2_run_args *args, int32_t ith, int32_t nth) {
    const infllm2_select_args *s = &args->select;
    const infllm2_attend_args *a = &args->attend;
    const infllm2_shape &shape = s->shape;
    const int64_t step = select_tokens(&shape), tiles = (shape.queries + step - 1) / step, budget = s->selection.budget;
    char *work = s->work + ith * s->work_stride;
    // Behind selection's own scratch: a list of blocks for each token of a tile, if the caller keeps none.
    int32_t *lists = reinterpret_cast<int32_t *>(work + s->work_stride - round_up(4 * step * budget, 64));
    for (int64_t item = ith; item < shape.batch * shape.kv_heads * tiles; item += nth) {
        const int64_t pair = item / tiles, first = item % tiles * step;
        const int64_t count = shape.queries - first < step ? shape.queries - first : step;
        const int64_t b = pair / shape.kv_heads, h = pair % shape.kv_heads;
        int32_t *blocks = s->blocks ? s->blocks + (pair * shape.queries + first) * budget : lists;
        Selector<Format>(s, work, b, h, first, count).run(blocks);
        for (int64_t i = 0; i < count; ++i) {
            Unit<Format> unit(a, a->work + ith * a->work_stride, b, h, first + i, 1);
            unit.visit_all(blocks + i * budget, budget, 0, 1);
            unit.finish();
        }
    }
}

}  // namespace NATIVE_LEVEL
}  // namespace native
