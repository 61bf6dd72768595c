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
constexpr float TOGETHER = 0.82f;

// Which of `count` tokens from `first` on visit each of the blocks that one of them can see: returns the number of
// visits; `visitors` gets a bit for each token.
inline int64_t find_visitors(const infllm2_shape &s, int64_t block_size, const int32_t *lists, int64_t width, int64_t first, int64_t count, uint64_t (*visitors)[2]) {
    const int64_t end = s.keys - s.queries + first + count, blocks = (end + block_size - 1) / block_size;
    std::memset(visitors, 0, sizeof(*visitors) * blocks);
    int64_t visits = 0;
    for (int64_t t = 0; t < count; ++t)
        for (int64_t i = 0; i < width && lists[t * width + i] >= 0; ++i) {
            const int64_t m = lists[t * width + i];
            if (m >= blocks) break;  // beyond every token of the tile
            visitors[m][t >> 6] |= uint64_t(1) << (t & 63);
            ++visits;
        }
    return visits;
}

// How many tokens of a tile to do together, whichever is least work: 1, a vector's worth, or all.
template <class Narrow, class Wide>
int64_t plan_tile(const infllm2_shape &s, int64_t block_size, const int32_t *lists, int64_t width, int64_t first, int64_t count, uint64_t (*visitors)[2]) {
    constexpr int L = Wide::Lanes::L;
    const int group = int(s.group), vector = L / group < 1 ? 1 : L / group;
    if (count == 1 || count * group > MOST_ROWS) return 1;
    const int64_t own = find_visitors(s, block_size, lists, width, first, count, visitors);
    const int64_t end = s.keys - s.queries + first + count, blocks = (end + block_size - 1) / block_size;
    int64_t shared = 0, all = 0;
    for (int64_t m = 0; m < blocks; ++m) {
        if (!(visitors[m][0] | visitors[m][1])) continue;
        ++all;
        for (int64_t t = 0; t < count; t += vector) shared += any_of(visitors[m], int(t), int(count - t < vector ? count - t : vector));
    }
    const bool narrow = group <= Narrow::Lanes::L && Narrow::Lanes::L < L;
    const float vectors = float((count * group + L - 1) / L), one = narrow ? 0.5f : float((group + L - 1) / L);
    const float alone = float(own) * one, by_vector = vector > 1 ? float(shared) : INFINITY;
    const float by_tile = float(all) * vectors * TOGETHER;
    return alone <= by_vector && alone <= by_tile ? 1 : by_vector < by_tile ? vector : count;
}

template <class Narrow, class Wide>
void attend_tile(const infllm2_attend_args *a, char *work, int64_t b, int64_t h, int64_t first, int64_t count, const int32_t *lists) {
    uint64_t(*visitors)[2] = rows_in(work, &a->shape).visitors;
    const int64_t step = plan_tile<Narrow, Wide>(a->shape, a->block_size, lists, a->width, first, count, visitors);
    const auto done = [](auto &&unit, auto visit) { visit(unit), unit.finish(); };
    for (int64_t t = 0; t < count; t += step) {
        const int64_t some = count - t < step ? count - t : step;
        const auto own = [&](auto &unit) { unit.visit_all(lists + t * a->width, a->width, 0, 1); };
        if (step > 1)
            done(Unit<Wide>(a, work, b, h, first + t, some), [&](auto &unit) { unit.visit_union(visitors, int(t)); });
        else if (a->shape.group <= Narrow::Lanes::L)
            done(Unit<Narrow>(a, work, b, h, first + t, 1), own);
        else
            done(Unit<Wide>(a, work, b, h, first + t, 1), own);
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
