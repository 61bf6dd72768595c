// Copied from common/native/run.hpp by common/sync.py: change it there.
// Selection and attention of each tile of tokens in one go: the lists of blocks never leave the near cache.
#pragma once
#include "attend.hpp"
#include "select.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

// Bytes a thread: selection's own, and behind them a tile's lists.
inline int64_t select_run_work(const native_shape *s, const native_selection *c) {
    return round_up(select_work(s, c) + lists_work(s, c) + 128, 64);
}

template <class Narrow, class Wide> void select_tile(const native_select_args *s, char *work, int64_t b, int64_t h, int64_t first, int64_t count, int32_t *blocks) {
    const int64_t step = select_tokens(&s->shape);
    for (int64_t t = 0; t < count; t += step) {
        const int64_t some = count - t < step ? count - t : step;
        int32_t *out = blocks + t * s->selection.budget;
        if (some * s->shape.group <= Narrow::Lanes::L)
            Selector<typename Narrow::Selecting>(s, work, b, h, first + t, some).run(out);
        else
            Selector<typename Wide::Selecting>(s, work, b, h, first + t, some).run(out);
    }
}

template <class Narrow, class Wide> void select(const native_select_args *s, int32_t ith, int32_t nth) {
    for_tiles(s->shape, select_tokens(&s->shape), 1, ith, nth, [&](auto b, auto h, auto first, auto count, auto pair, auto) {
        select_tile<Narrow, Wide>(s, s->work + ith * s->work_stride, b, h, first, count, s->blocks + (pair * s->shape.queries + first) * s->selection.budget);
    });
}

template <class Narrow, class Wide> void run(const native_run_args *args, int32_t ith, int32_t nth) {
    const native_select_args *s = &args->select;
    const native_attend_args *a = &args->attend;
    char *work = s->work + ith * s->work_stride;
    // Behind selection's own scratch: a tile's lists of blocks, if the caller keeps none.
    int32_t *lists = reinterpret_cast<int32_t *>(work + s->work_stride - lists_work(&s->shape, &s->selection));
    for_tiles(s->shape, a->tile, 1, ith, nth, [&](auto b, auto h, auto first, auto count, auto pair, auto) {
        int32_t *blocks = s->blocks ? s->blocks + (pair * s->shape.queries + first) * s->selection.budget : lists;
        select_tile<Narrow, Wide>(s, work, b, h, first, count, blocks);
        attend_tile<Narrow, Wide>(a, a->work + ith * a->work_stride, b, h, first, count, blocks);
    });
}

}  // namespace NATIVE_LEVEL
}  // namespace native
