// Shares out block-sparse and dense attention: which rows go through the kernel of rows.hpp together.
//
// Tokens have different sets of blocks, but neighbours share many. A tile of tokens is done in the cheapest of
// three ways, all exact: each token with its own blocks; a vector's worth of tokens with the union of theirs; the
// whole tile with its union, which is dense attention with holes and so never costs much more than that.
#pragma once
#include "rows.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

// Time of one block for one wide vector of rows alone; in a tile, neighbours share broadcasts and paired values.
constexpr float ALONE = 1.f, TOGETHER = 0.82f;

template <class Unit> inline void visit_own(Unit &&unit, const int32_t *blocks, int64_t width) {
    unit.visit_all(blocks, width, 0, 1);
    unit.finish();
}

template <class Narrow, class Wide>
void attend_tile(const infllm2_attend_args *a, char *work, int64_t b, int64_t h, int64_t first, int64_t count, const int32_t *lists) {
    constexpr int L = Wide::Lanes::L;
    const int group = int(a->shape.group);
    const bool narrow = group <= Narrow::Lanes::L;
    const auto each = [&] {
        for (int64_t t = 0; t < count; ++t) {
            if (narrow)
                visit_own(Unit<Narrow>(a, work, b, h, first + t, 1), lists + t * a->width, a->width);
            else
                visit_own(Unit<Wide>(a, work, b, h, first + t, 1), lists + t * a->width, a->width);
        }
    };
    if (count == 1 || count * group > MOST_ROWS) return each();

    uint64_t(*visitors)[2] = rows_in(work, &a->shape).visitors;
    const int64_t end = a->shape.keys - a->shape.queries + first + count, blocks = (end + a->block_size - 1) / a->block_size;
    std::memset(visitors, 0, sizeof(*visitors) * blocks);
    int64_t own = 0, shared = 0, all = 0;
    const int vector = L / group < 1 ? 1 : L / group;  // tokens to a vector
    for (int64_t t = 0; t < count; ++t)
        for (int64_t i = 0; i < a->width && lists[t * a->width + i] >= 0; ++i) {
            const int64_t m = lists[t * a->width + i];
            if (m >= blocks) break;  // beyond every token of the tile
            visitors[m][t >> 6] |= uint64_t(1) << (t & 63);
            ++own;
        }
    for (int64_t m = 0; m < blocks; ++m) {
        if (!(visitors[m][0] | visitors[m][1])) continue;
        ++all;
        for (int64_t t = 0; t < count; t += vector)
            shared += Unit<Wide>::any_of(visitors[m], int(t), int(count - t < vector ? count - t : vector));
    }
    const float vectors = float((count * group + L - 1) / L), one = float((group + L - 1) / L);
    const float alone = float(own) * ALONE * (narrow && Narrow::Lanes::L < L ? 0.5f : one);
    const float by_vector = vector > 1 ? float(shared) * ALONE : INFINITY, by_tile = float(all) * vectors * TOGETHER;
    if (alone <= by_vector && alone <= by_tile) return each();
    const int64_t step = by_vector < by_tile ? vector : count;
    for (int64_t t = 0; t < count; t += step) {
        Unit<Wide> unit(a, work, b, h, first + t, count - t < step ? count - t : step);
        unit.visit_union(visitors, int(t));
        unit.finish();
    }
}

// Calls f(batch, head, first token, tokens, pair, item) for share `ith` of `nth` of the tiles, `times` each.
template <class F> inline void for_tiles(const infllm2_shape &s, int64_t step, int64_t times, int32_t ith, int32_t nth, F f) {
    const int64_t tiles = (s.queries + step - 1) / step;
    for (int64_t item = ith; item < s.batch * s.kv_heads * tiles * times; item += nth) {
        const int64_t tile = item / times % tiles, pair = item / times / tiles, first = tile * step;
        f(pair / s.kv_heads, pair % s.kv_heads, first, s.queries - first < step ? s.queries - first : step, pair, item);
    }
}

// Shares of one tile, or the merging of them.
template <class Format> void attend_split(const infllm2_attend_args *a, int32_t ith, int32_t nth, bool merging) {
    const int64_t floats = most_lanes(&a->shape) * (a->shape.dim + 2);
    char *work = a->work + ith * a->work_stride;
    for_tiles(a->shape, a->tile, merging ? 1 : a->splits, ith, nth, [&](auto b, auto h, auto first, auto count, auto pair, auto item) {
        Unit<Format> unit(a, work, b, h, first, count);
        if (merging)
            for (int64_t i = 0; i < a->splits; ++i) unit.absorb(a->partial + (item * a->splits + i) * floats);
        else
            unit.visit_all(a->blocks ? a->blocks + (pair * a->shape.queries + first) * a->width : nullptr, a->width, item % a->splits, a->splits);
        if (merging || a->splits == 1)
            unit.finish();
        else
            unit.save(a->partial + item * floats);
    });
}

template <class Narrow, class Wide> void attend(const infllm2_attend_args *a, int32_t ith, int32_t nth, bool merging) {
    if (a->blocks && a->splits == 1)
        for_tiles(a->shape, a->tile, 1, ith, nth, [&](auto b, auto h, auto first, auto count, auto pair, auto) {
            attend_tile<Narrow, Wide>(a, a->work + ith * a->work_stride, b, h, first, count, a->blocks + (pair * a->shape.queries + first) * a->width);
        });
    else if (a->tile * a->shape.group <= Narrow::Lanes::L)
        attend_split<Narrow>(a, ith, nth, merging);
    else
        attend_split<Wide>(a, ith, nth, merging);
}

}  // namespace NATIVE_LEVEL
}  // namespace native
