// Copied from common/native/attend.hpp by common/sync.py: change it there.
// Shares out block-sparse and dense attention: which rows go through the kernel of rows.hpp together.
//
// Tokens have different sets of blocks, but neighbours share many. A tile of tokens is done in the cheapest of
// three ways, all exact: each token with its own blocks; a vector's worth of tokens with the union of theirs; the
// whole tile with its union, which is dense attention with holes and so never costs much more than that.
#pragma once
#include "amx_attend.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

// Which of `count` tokens from `first` on visit each of the blocks that one of them can see: a bit for each token.
inline void find_visitors(const native_shape &s, int64_t block_size, const int32_t *lists, int64_t width, int64_t first, int64_t count, uint64_t (*visitors)[2]) {
    const int64_t end = s.keys - s.queries + first + count, blocks = (end + block_size - 1) / block_size;
    std::memset(visitors, 0, sizeof(*visitors) * blocks);
    for (int64_t t = 0; t < count; ++t)
        for (int64_t i = 0; i < width && lists[t * width + i] >= 0; ++i) {
            const int64_t m = lists[t * width + i];
            if (m >= blocks) break;  // beyond every token of the tile
            visitors[m][t >> 6] |= uint64_t(1) << (t & 63);
        }
}

// Lane groups of L rows with a visitor, over all blocks.
inline int64_t active_groups(const native_shape &s, int64_t first, int64_t count, int64_t block_size, const uint64_t (*visitors)[2], int L) {
    const int64_t blocks = (s.keys - s.queries + first + count + block_size - 1) / block_size;
    const int heads = int(s.group), rows = int(count) * heads;
    int64_t found = 0;
    for (int64_t m = 0; m < blocks; ++m) {
        if (!(visitors[m][0] | visitors[m][1])) continue;
        for (int row = 0; row < rows; row += L) {
            const int token = row / heads, last = (row + L < rows ? row + L - 1 : rows - 1) / heads;
            found += any_of(visitors[m], token, last - token + 1);
        }
    }
    return found;
}

// Whether a call's rows go through tiles of AMX. All do but a single token's and those with windows, and however many are done together, so that
// the bits of a row depend neither on units of work nor on how a prompt was cut.
template <class Format> inline bool on_tiles(const native_attend_args *a) {
#if defined(__AMX_BF16__)
    return std::is_same_v<typename Format::Source, bf16> && a->splits == 1 && a->shape.queries > 1 && !a->window;
#else
    return (void)a, false;
#endif
}

// Block by block: what reading and repacking a block costs is shared by the tokens that visit it, and lane groups
// without such a token are left out. A narrow vector takes half the time and holds fewer tokens.
template <class Narrow, class Wide>
void attend_tile(const native_attend_args *a, char *work, int64_t b, int64_t h, int64_t first, int64_t count, const int32_t *lists) {
    const native_shape &s = a->shape;
#if defined(__AMX_BF16__)
    if constexpr (std::is_same_v<typename Wide::Source, bf16>)
        if (on_tiles<Wide>(a)) {
            TileUnit<typename Wide::Cached> unit(a, work, b, h, first, count);
            if (lists) find_visitors(s, a->block_size, lists, a->width, first, count, unit.visitors);
            lists ? unit.visit_union() : unit.visit_all();
            return unit.finish();
        }
#endif
    constexpr int narrow = Narrow::Lanes::L, wide = Wide::Lanes::L;
    if (count == 1) {
        const auto alone = [&](auto &&unit) { unit.visit_all(lists, a->width, 0, 1), unit.finish(); };
        if (s.group <= narrow) return alone(Unit<Narrow>(a, work, b, h, first, count));
        return alone(Unit<Wide>(a, work, b, h, first, count));
    }
    uint64_t(*visitors)[2] = rows_in(work, &s).visitors;
    find_visitors(s, a->block_size, lists, a->width, first, count, visitors);
    const auto together = [&](auto &&unit) { unit.visit_union(visitors), unit.finish(); };
    if (narrow < wide && s.group <= narrow &&
        active_groups(s, first, count, a->block_size, visitors, narrow) < 2 * active_groups(s, first, count, a->block_size, visitors, wide))
        return together(Unit<Narrow>(a, work, b, h, first, count));
    together(Unit<Wide>(a, work, b, h, first, count));
}

// Calls f(batch, head, first token, tokens, pair, item) for share `ith` of `nth` of the tiles, `times` each.
template <class F> inline void for_tiles(const native_shape &s, int64_t step, int64_t times, int32_t ith, int32_t nth, F f) {
    const int64_t tiles = (s.queries + step - 1) / step;
    for (int64_t item = ith; item < s.batch * s.kv_heads * tiles * times; item += nth) {
        const int64_t tile = item / times % tiles, pair = item / times / tiles, first = tile * step;
        f(pair / s.kv_heads, pair % s.kv_heads, first, s.queries - first < step ? s.queries - first : step, pair, item);
    }
}

// Shares of one tile, or the merging of them.
template <class Format> void attend_split(const native_attend_args *a, int32_t ith, int32_t nth, bool merging) {
    const int64_t floats = partial_floats(&a->shape);
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

template <class Narrow, class Wide> void attend(const native_attend_args *a, int32_t ith, int32_t nth, bool merging) {
    if (on_tiles<Wide>(a) || (a->blocks && a->splits == 1))
        for_tiles(a->shape, a->tile, 1, ith, nth, [&](auto b, auto h, auto first, auto count, auto pair, auto) {
            const int32_t *lists = a->blocks ? a->blocks + (pair * a->shape.queries + first) * a->width : nullptr;
            attend_tile<Narrow, Wide>(a, a->work + ith * a->work_stride, b, h, first, count, lists);
        });
    else if (a->tile * a->shape.group <= Narrow::Lanes::L)
        attend_split<Narrow>(a, ith, nth, merging);
    else
        attend_split<Wide>(a, ith, nth, merging);
}

}  // namespace NATIVE_LEVEL
}  // namespace native
