// Copied from common/native/rows.hpp by common/sync.py: change it there.
// Softmax attention of packed rows over tiles of keys, with a running maximum (Milakov & Gimelshein,
// arXiv 1805.02867; FlashAttention, 2205.14135). Rows are lanes: heads of a group, or tokens × heads.
#pragma once
#include "attend_args.h"
#include "few_floats.hpp"
#include "few_int8.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

// Is any of `count` of 128 bits from `from` on set? 0 < count <= 64, from + count <= 128.
inline bool any_of(const uint64_t *bits, int from, int count) {
    const int word = from >> 6, shift = from & 63;
    uint64_t found = bits[word] >> shift;
    if (shift + count > 64) found |= bits[1] << (64 - shift);
    return found << (64 - count);
}

// Rows of one unit of work, in groups of L lanes. All arrays are the thread's own.
struct Rows {
    float *q, *out, *top, *sum, *scores, *key_scratch, *value_scratch;
    int32_t *visible, *hidden, *active;
    uint64_t (*visitors)[2];  // for each block, which tokens of a tile visit it
};

constexpr int MOST_ROWS = 512;  // of a unit of work: many share what reading and repacking a tile of keys costs
constexpr int MOST_TOKENS = 128;  // of a unit of work: bits in `visitors`

template <class V> inline int lane_groups(int64_t rows) { return int((rows + V::L - 1) / V::L); }

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The largest number of lanes any unit has, whatever the vector's width.
inline int64_t most_lanes(const native_shape *s) { return round_up(s->group > MOST_ROWS ? s->group : MOST_ROWS, 16); }

// Bytes a thread, for blocks of `block_size` keys.
inline int64_t attend_rows_work(const native_shape *s, int64_t block_size) {
    const int64_t lanes = most_lanes(s);
    return 4 * (lanes * (2 * s->dim + 5) + 2 * (TILE + 1) * 16 + 2 * TILE * s->dim) + 16 * (s->keys / block_size + 1) + 1024;
}

// Floats of a partial result of one unit and split.
inline int64_t partial_floats(const native_shape *s) { return most_lanes(s) * (s->dim + 2); }

inline Rows rows_in(char *work, const native_shape *s) {
    const int64_t lanes = most_lanes(s), dim = s->dim;
    float *p = reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(work) + 63) & ~uintptr_t(63));
    Rows r;
    r.q = p, p += lanes * dim;
    r.out = p, p += lanes * dim;
    r.scores = p, p += 2 * (TILE + 1) * 16;
    r.key_scratch = p, p += TILE * dim;
    r.value_scratch = p, p += TILE * dim;
    r.top = p, p += lanes;
    r.sum = p, p += lanes;
    r.visible = reinterpret_cast<int32_t *>(p), p += lanes;
    r.hidden = reinterpret_cast<int32_t *>(p), p += lanes;
    r.active = reinterpret_cast<int32_t *>(p), p += lanes;
    r.visitors = reinterpret_cast<uint64_t(*)[2]>(p);
    return r;
}

// Beside a tile's first product: asks for the next tile's keys, and makes the values ready.
template <class Values> struct Prepare {
    Fetch fetch;
    const Values &values;
    template <int N> void step(int n, int k, int depth) const {
        fetch.step<N>(n, k, depth);
        values.template step<N>(n, k, depth);
    }
};

// One tile of n keys for G lane groups, `group` and the one `apart` groups further. visible: where the keys end that each
// lane sees, and hidden: where they begin; null if no lane's do within the tile. FIRST: nobody has attended to this tile before.
template <class Format, int G, bool FIRST>
inline void update(const Rows &r, ptrdiff_t group, ptrdiff_t apart, int depth, int dim, float scale, const Tile<typename Format::Dot::Unit> &keys,
                   const typename Format::Values &values, int n, const int32_t *visible, const int32_t *hidden, const char *next_keys, const char *next_values) {
    using V = typename Format::Lanes;
    using T = typename V::T;
    constexpr int L = V::L, GROUP = TILE * L;
    const ptrdiff_t q_size = ptrdiff_t(depth) * L, out_size = ptrdiff_t(dim) * L;
    float *s = r.scores;
    if constexpr (FIRST)
        scores<Format, G>(keys, n, r.q + group * q_size, apart * q_size, depth, s, Prepare<typename Format::Values>{{next_keys}, values});
    else
        scores<Format, G>(keys, n, r.q + group * q_size, apart * q_size, depth, s);
    const T factor = V::set(scale), never = V::set(-INFINITY);
    for (int g = 0; g < G; ++g) {
        float *x = s + g * GROUP, *top = r.top + (group + g * apart) * L, *sum = r.sum + (group + g * apart) * L;
        if (visible)
            for (int i = 0; i < n; ++i) V::store(x + i * L, V::where_reached(i, visible + g * L, never, V::load(x + i * L)));
        if (hidden)
            for (int i = 0; i < n; ++i) V::store(x + i * L, V::where_reached(i, hidden + g * L, V::load(x + i * L), never));
        // Four at a time: a maximum or a sum waits for the one before it.
        T best[4] = {never, never, never, never}, part[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
        int i = 0;
        for (; i + 4 <= n; i += 4)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) best[j] = V::max(V::load(x + (i + j) * L), best[j]);
        for (; i < n; ++i) best[0] = V::max(V::load(x + i * L), best[0]);
        const T most = V::max(V::max(best[0], best[1]), V::max(best[2], best[3]));
        const T before = V::load(top), now = V::max(before, V::mul(most, factor));
        const T minus = V::mul(now, V::set(-1.f));
        T total = V::load(sum);
        if (V::any_greater(now, before)) {
            const T shrink = V::exp2(V::add(before, minus));
            total = V::mul(total, shrink);
            float *o = r.out + (group + g * apart) * out_size;
            for (int d = 0; d < dim; ++d) V::store(o + d * L, V::mul(V::load(o + d * L), shrink));
            V::store(top, now);
        }
        const auto weigh = [&](int key, T &sum_of) {
            const T weight = V::template exp2<Format::EXP_DEGREE>(V::fma(V::load(x + key * L), factor, minus));
            sum_of = V::add(sum_of, weight);
            V::store(x + key * L, weight);
        };
        for (i = 0; i + 4 <= n; i += 4)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) weigh(i + j, part[j]);
        for (; i < n; ++i) weigh(i, part[i & 3]);  // the same sum as in a longer tile
        V::store(sum, V::add(total, V::add(V::add(part[0], part[1]), V::add(part[2], part[3]))));
        Format::pack_weights(x, n);
    }
    constexpr int AT_ONCE = columns_at_once<V, G>();
    const auto tile = values.finish(FIRST ? n / AT_ONCE * AT_ONCE : n);
    const auto weighted = [&](auto aside) {
        broadcast_gemm<V, typename Format::Dot, G, 1>(tile.data, tile.column, tile.step, s, GROUP, Format::units(n), dim, r.out + group * out_size,
                                                      apart * out_size, true, aside);
    };
    if constexpr (FIRST)
        weighted(Fetch{next_values});
    else
        weighted(Nothing());
}

// The rows of queries [first, first + tokens) of one batch row and key-value head.
template <class Format> struct Unit {
    using V = typename Format::Lanes;
    using Source = typename Format::Source;
    using Cached = typename Format::Cached;
    static constexpr int L = V::L;
    const native_attend_args *a;
    Rows r;
    int64_t batch, head, first, tokens;
    int rows, groups, depth, dim;

    Unit(const native_attend_args *args, char *work, int64_t b, int64_t h, int64_t t, int64_t count)
        : a(args), r(rows_in(work, &args->shape)), batch(b), head(h), first(t), tokens(count) {
        dim = int(a->shape.dim);
        depth = Format::units(dim);
        rows = int(tokens * a->shape.group);
        groups = lane_groups<V>(rows);
        if (std::is_same<typename Format::Dot::Unit, float>::value) depth = dim;
        std::memset(r.q, 0, sizeof(float) * groups * depth * L);
        std::memset(r.out, 0, sizeof(float) * groups * dim * L);
        for (int i = 0; i < rows; ++i)
            Format::pack_query(query(i), dim, r.q + ptrdiff_t(i / L) * depth * L + i % L, L);
        for (int i = 0; i < groups * L; ++i) r.top[i] = LOWEST, r.sum[i] = 0.f;
    }

    const Source *query(int row) const {
        const int64_t h = head * a->shape.group + row % a->shape.group, t = first + row / a->shape.group;
        return static_cast<const Source *>(a->q.data) + batch * a->q.batch + h * a->q.head + t * a->q.row;
    }
    // Absolute position of a row's token.
    int64_t position(int row) const { return a->shape.keys - a->shape.queries + first + row / a->shape.group; }

    // The first key that a row sees.
    int64_t first_key(int row) const { return a->window && position(row) >= a->window ? position(row) - a->window + 1 : 0; }

    std::pair<const Cached *, const Cached *> cached_at(int64_t start) const {
        return {static_cast<const Cached *>(a->k.data) + batch * a->k.batch + head * a->k.head + start * a->k.row,
                static_cast<const Cached *>(a->v.data) + batch * a->v.batch + head * a->v.head + start * a->v.row};
    }

    // How many of the keys [start, start + n) each lane of group g sees, into `visible`; lowers *least and raises *most
    // to those of its real rows. Tokens whose bit is not set in `visitors` see none.
    void count_seen(int g, int64_t start, int n, const uint64_t *visitors, int32_t *visible, int32_t *least, int32_t *most) const {
        for (int i = 0, row = g * L; i < L; ++i, ++row) {
            int64_t seen = row < rows ? position(row) + 1 - start : 0;
            if (visitors && row < rows) {
                const int token = row / int(a->shape.group);
                if (!(visitors[token >> 6] >> (token & 63) & 1)) seen = 0;
            }
            visible[i] = int32_t(seen < 0 ? 0 : (seen > n ? n : seen));
            if (row < rows) *least = visible[i] < *least ? visible[i] : *least;
            *most = visible[i] > *most ? visible[i] : *most;
        }
    }

    // Where the keys that each lane of group g sees begin among [start, start + n), into `hidden`; whether one's do.
    bool count_hidden(int g, int64_t start, int n, int32_t *hidden) const {
        bool any = false;
        for (int i = 0, row = g * L; i < L; ++i, ++row) {
            const int64_t before = row < rows ? first_key(row) - start : 0;
            hidden[i] = int32_t(before < 0 ? 0 : (before > n ? n : before));
            any |= hidden[i] > 0;
        }
        return any;
    }

    // Lane groups that can see a key from `start` on, and hold a token whose bit is set in `visitors` (null: any), into
    // r.active; returns their number.
    int find_active(int64_t start, const uint64_t *visitors) const {
        const int heads = int(a->shape.group);
        int count = 0;
        for (int g = 0; g < groups; ++g) {
            const int last_row = (g + 1) * L < rows ? (g + 1) * L - 1 : rows - 1, token = g * L / heads;
            if (position(last_row) >= start && (!visitors || any_of(visitors, token, last_row / heads - token + 1))) r.active[count++] = g;
        }
        return count;
    }

    // Keys [start, start + n); `next` begins the tile after it, -1 if there is none. Of the tokens only those whose
    // bits are set in `visitors` attend; all do if it is null.
    void visit(int64_t start, int n, int64_t next, const uint64_t *visitors = nullptr) {
        const auto [k, v] = cached_at(start);
        const auto keys = Format::keys(k, a->k.row, n, dim, r.key_scratch);
        const typename Format::Values values(v, a->v.row, n, dim, r.value_scratch);
        const bool ahead = next >= 0 && a->k.row == dim + Format::BESIDE && a->v.row == dim + Format::BESIDE;
        const char *next_keys = reinterpret_cast<const char *>(ahead ? k + (next - start) * a->k.row : k);
        const char *next_values = reinterpret_cast<const char *>(ahead ? v + (next - start) * a->v.row : v);
        const int count = find_active(start, visitors);
        for (int i = 0, step; i < count; i += step) {
            step = i + 2 <= count ? 2 : 1;
            const int g = r.active[i], apart = r.active[i + step - 1] - g;
            int32_t least = n, most = 0;
            for (int j = 0; j < step; ++j) count_seen(g + j * apart, start, n, visitors, r.visible + j * L, &least, &most);
            bool hidden = false;
            for (int j = 0; a->window && j < step; ++j) hidden |= count_hidden(g + j * apart, start, n, r.hidden + j * L);
            const auto with = [&](auto groups_at_once, auto first) {
                update<Format, decltype(groups_at_once)::value, decltype(first)::value>(r, g, apart, depth, dim, a->scale * LOG2E, keys, values, n,
                                                                                        least < n ? r.visible : nullptr, hidden ? r.hidden : nullptr,
                                                                                        next_keys, next_values);
            };
            using One = std::integral_constant<int, 1>;
            using Two = std::integral_constant<int, 2>;
            if (i == 0)
                step == 2 ? with(Two(), std::true_type()) : with(One(), std::true_type());
            else
                step == 2 ? with(Two(), std::false_type()) : with(One(), std::false_type());
        }
    }

    // The blocks that any of the tokens visits.
    void visit_union(const uint64_t (*visitors)[2]) {
        const int64_t end = position(rows - 1) + 1, blocks = (end + a->block_size - 1) / a->block_size;
        const auto after = [&](int64_t m) {
            for (++m; m < blocks && !(visitors[m][0] | visitors[m][1]);) ++m;
            return m;
        };
        for (int64_t m = after(-1), later; m < blocks; m = later) {
            later = after(m);
            const int64_t next = a->block_size == TILE && (later + 1) * TILE <= end ? later * TILE : -1;
            int64_t start = m * a->block_size, stop = start + a->block_size;
            for (stop = stop < end ? stop : end; start < stop; start += TILE)
                visit(start, int(stop - start < TILE ? stop - start : TILE), next, visitors[m]);
        }
    }

    // Share `split` of `splits` of the keys: the listed blocks, or all.
    void visit_all(const int32_t *blocks, int64_t width, int64_t split, int64_t splits) {
        [[maybe_unused]] const auto query_of = [&](int head) { return query(head); };
        const auto tiles = [&](auto f) { for_tiles_of_keys(blocks, width, split, splits, f); };
        [[maybe_unused]] const auto bytes = [](const Cached *p) { return reinterpret_cast<const char *>(p); };
#if defined(__AVX512BF16__)
#if defined(__AVX512VNNI__)
        if constexpr (Format::FEW_HEADS && std::is_same<Cached, int8_t>::value) {
            const auto with = [&](auto f) { return with_few_int8(a->shape.group, dim, query_of, a->scale * LOG2E, f); };
            if (visit_few(tiles, with, [&](auto &few, const Cached *k, const Cached *v, int n, ptrdiff_t ahead) {
                    few.visit(k, v, a->k.row, n, bytes(k + ahead), bytes(v + ahead));
                }))
                return;
        }
#endif
        if constexpr (Format::FEW_HEADS) {
            const auto with = [&](auto f) { return with_few_heads(a->shape.group, dim, query_of, a->scale * LOG2E, f); };
            if (visit_few(tiles, with, [&](auto &few, const Cached *k, const Cached *v, int n, ptrdiff_t ahead) {
                    few.visit(tile_rows(k, a->k.row, n, dim, r.key_scratch), tile_rows(v, a->v.row, n, dim, r.value_scratch), n, bytes(k + ahead),
                              bytes(v + ahead), a->k.row * sizeof(Cached));
                }))
                return;
        }
#endif
#if defined(__AVX2__)
        if constexpr (!Format::FEW_HEADS) {
            const auto with = [&](auto f) {
                return with_few_floats<Cached, Format::EXP_DEGREE>(a->shape.group, dim, a->k.row, query_of, a->scale * LOG2E, f);
            };
            if (visit_few(tiles, with, [](auto &few, const Cached *k, const Cached *v, int n, ptrdiff_t ahead) {
                    few.visit(k, v, n, k + ahead, v + ahead);
                }))
                return;
        }
#endif
        tiles([&](int64_t start, int n, int64_t next) { visit(start, n, next); });
    }

    // The only token, by a kernel for few heads to a key: tiles(f) goes through the keys; with(f) calls f(kernel) if there is
    // one for this shape, and says whether; step(kernel, keys, values, number, elements to the next tile) is its work on a tile.
    template <class Tiles, class With, class Step> bool visit_few(Tiles tiles, With with, Step step) {
        // Decided by the step's tokens, not by a unit's: how many share a unit depends on the number of threads, and results must not.
        if (a->shape.queries != 1 || a->window || a->k.row != a->v.row) return false;
        return with([&](auto &few) {
            tiles([&](int64_t start, int n, int64_t next) {
                const auto [k, v] = cached_at(start);
                step(few, k, v, n, next < 0 ? 0 : (next - start) * a->k.row);
            });
            few.put(r.out, r.top, r.sum, L);
        });
    }

    // Calls f(first key, keys, first key of the tile after it or -1).
    template <class F> void for_tiles_of_keys(const int32_t *blocks, int64_t width, int64_t split, int64_t splits, F f) const {
        const int64_t end = position(rows - 1) + 1;
        if (!blocks) {
            const int64_t before = first_key(0) / TILE, tiles = (end + TILE - 1) / TILE - before;
            for (int64_t i = before + split * tiles / splits; i < before + (split + 1) * tiles / splits; ++i)
                f(i * TILE, int(end - i * TILE < TILE ? end - i * TILE : TILE), (i + 2) * TILE <= end ? (i + 1) * TILE : -1);
            return;
        }
        int64_t count = 0;
        while (count < width && blocks[count] >= 0) ++count;
        for (int64_t i = split * count / splits; i < (split + 1) * count / splits; ++i) {
            int64_t start = int64_t(blocks[i]) * a->block_size, stop = start + a->block_size;
            const int64_t next = i + 1 < count && a->block_size == TILE ? int64_t(blocks[i + 1]) * TILE : -1;
            for (stop = stop < end ? stop : end; start < stop; start += TILE)
                f(start, int(stop - start < TILE ? stop - start : TILE), next);
        }
    }

    void finish() const {
        for (int i = 0; i < rows; ++i) {
            const int64_t h = head * a->shape.group + i % a->shape.group, t = first + i / a->shape.group;
            const int64_t row = (batch * a->shape.kv_heads * a->shape.group + h) * a->shape.queries + t;
            const float total = r.sum[i], inverse = total == 0.f ? 0.f : 1.f / total;
            const float *o = r.out + ptrdiff_t(i / L) * dim * L + i % L;
            Source *out = static_cast<Source *>(a->out) + row * dim;
            for (int d = 0; d < dim; ++d) from_float(o[d * L] * inverse, out + d);
            if (a->lse) a->lse[row] = total == 0.f ? -INFINITY : (r.top[i] + std::log2(total)) * LN2;
        }
    }

    // Unfinished sums to and from memory: [groups][dim + 2][L].
    void save(float *to) const {
        for (int g = 0; g < groups; ++g, to += (dim + 2) * L) {
            std::memcpy(to, r.out + ptrdiff_t(g) * dim * L, sizeof(float) * dim * L);
            std::memcpy(to + dim * L, r.top + g * L, sizeof(float) * L);
            std::memcpy(to + (dim + 1) * L, r.sum + g * L, sizeof(float) * L);
        }
    }
    void absorb(const float *from) {
        using T = typename V::T;
        for (int g = 0; g < groups; ++g, from += (dim + 2) * L) {
            const T mine = V::load(r.top + g * L), theirs = V::load(from + dim * L);
            const T now = V::max(theirs, mine), minus = V::mul(now, V::set(-1.f));
            const T a1 = V::exp2(V::add(mine, minus)), a2 = V::exp2(V::add(theirs, minus));
            float *o = r.out + ptrdiff_t(g) * dim * L;
            for (int d = 0; d < dim; ++d)
                V::store(o + d * L, V::fma(V::load(from + d * L), a2, V::mul(V::load(o + d * L), a1)));
            V::store(r.sum + g * L, V::fma(V::load(from + (dim + 1) * L), a2, V::mul(V::load(r.sum + g * L), a1)));
            V::store(r.top + g * L, now);
        }
    }
};

}  // namespace NATIVE_LEVEL
}  // namespace native
