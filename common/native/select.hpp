// Which blocks a query visits (arXiv 2509.24663, sections 3.2 and 3.3), in one pass over the compressed keys:
// scores of a few tokens at a time, pooled to blocks and ranked at once, so that L²/16 scores are never held.
#pragma once
#include "select_args.h"
#include "rows.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

constexpr int SELECT_LANES = 32;  // rows (tokens × heads) scored at a time

struct Scratch {
    float *q, *scores, *turned, *top, *sum, *lse, *key_scratch;
    int32_t *visible;
    float *tokens;  // [tokens][width]: a score for each kernel
    int64_t width;
};

inline int64_t select_tokens(const native_shape *s) {
    const int64_t most = SELECT_LANES / s->group;
    return most < 1 ? 1 : (most < s->queries ? most : s->queries);
}
inline int64_t select_lanes(const native_shape *s) { return ((s->group > SELECT_LANES ? s->group : SELECT_LANES) + 15) / 16 * 16; }
inline int64_t score_width(const native_shape *s, const native_selection *c) {
    const int64_t per_block = c->block_size / c->kernel_stride, overlap = c->kernel_size / c->kernel_stride - 1;
    return ((s->keys / c->block_size + 2) * per_block + overlap + TILE + 15) / 16 * 16;
}
inline int64_t select_work(const native_shape *s, const native_selection *c) {
    const int64_t lanes = select_lanes(s);
    return 4 * (lanes * (s->dim + 4) + 2 * (TILE + 1) * 16 + 16 * 16 + TILE * s->dim + select_tokens(s) * score_width(s, c)) + 1024;
}
// Lists of blocks of the tokens of one tile, at most MOST_ROWS.
inline int64_t lists_work(const native_shape *s, const native_selection *c) {
    const int64_t tokens = MOST_ROWS / s->group;
    return 4 * (tokens < 1 ? 1 : tokens) * c->budget;
}
inline Scratch scratch_in(char *work, const native_shape *s, const native_selection *c) {
    const int64_t lanes = select_lanes(s);
    float *p = reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(work) + 63) & ~uintptr_t(63));
    Scratch r;
    r.q = p, p += lanes * s->dim;
    r.scores = p, p += 2 * (TILE + 1) * 16;
    r.turned = p, p += 16 * 16;
    r.key_scratch = p, p += TILE * s->dim;
    r.top = p, p += lanes;
    r.sum = p, p += lanes;
    r.lse = p, p += lanes;
    r.visible = reinterpret_cast<int32_t *>(p), p += lanes;
    r.tokens = p;
    r.width = score_width(s, c);
    return r;
}

inline int64_t kernels_seen(int64_t position, int64_t size, int64_t stride) {
    return position + 1 < size ? 0 : (position + 1 - size) / stride + 1;
}

// The tokens [first, first + count) of one batch row and key-value head.
template <class Format> struct Selector {
    using V = typename Format::Lanes;
    using T = typename V::T;
    using Source = typename Format::Source;
    static constexpr int L = V::L;
    const native_select_args *a;
    const native_selection &c;
    Scratch r;
    int64_t batch, head, first, tokens;
    int rows, groups, depth, dim, group;

    Selector(const native_select_args *args, char *work, int64_t b, int64_t h, int64_t t, int64_t count)
        : a(args), c(args->selection), r(scratch_in(work, &args->shape, &args->selection)), batch(b), head(h), first(t), tokens(count) {
        dim = int(a->shape.dim), group = int(a->shape.group);
        depth = std::is_same<typename Format::Dot::Unit, float>::value ? dim : Format::units(dim);
        rows = int(tokens * group);
        groups = (rows + L - 1) / L;
    }

    int64_t position(int64_t token) const { return a->shape.keys - a->shape.queries + first + token; }

    void pack_queries() {
        std::memset(r.q, 0, sizeof(float) * groups * depth * L);
        for (int i = 0; i < rows; ++i) {
            const int64_t h = head * group + i % group, t = first + i / group;
            const Source *q = static_cast<const Source *>(a->q.data) + batch * a->q.batch + h * a->q.head + t * a->q.row;
            Format::pack_query(q, dim, r.q + ptrdiff_t(i / L) * depth * L + i % L, L);
        }
    }

    // Logits (not scaled) of kernels [start, start + n) for G lane groups from g on; more to come up to `most`.
    template <int G> void logits(const native_tensor &kernels, int64_t start, int n, int64_t most, int g) {
        const Source *k = static_cast<const Source *>(kernels.data) + batch * kernels.batch + head * kernels.head + start * kernels.row;
        const auto keys = Format::keys(k, kernels.row, n, dim, r.key_scratch);
        const float *q = r.q + ptrdiff_t(g) * depth * L;
        if (G == 1 && start + 2 * TILE <= most && kernels.row == dim)
            scores<Format, G>(keys, n, q, 0, depth, r.scores, Fetch{reinterpret_cast<const char *>(k + TILE * kernels.row)});
        else
            scores<Format, G>(keys, n, q, ptrdiff_t(depth) * L, depth, r.scores);
    }

    // How many kernels each lane of a pair of groups sees; returns the fewest and the most of real rows.
    void count_visible(int64_t size, int64_t stride, int g, int step, int64_t *fewest, int64_t *most) {
        *fewest = INT64_MAX, *most = 0;
        for (int i = 0; i < step * L; ++i) {
            const int row = g * L + i;
            const int64_t seen = row < rows ? kernels_seen(position(row / group), size, stride) : 0;
            r.visible[i] = int32_t(seen);
            if (row < rows) *fewest = seen < *fewest ? seen : *fewest, *most = seen > *most ? seen : *most;
        }
    }

    // lse (base 2) of each row over the kernels it sees; -inf where it sees none.
    template <int G> void normalise(const native_tensor &kernels, int64_t size, int64_t stride, int g, float *lse) {
        int64_t fewest, most;
        count_visible(size, stride, g, G, &fewest, &most);
        const T factor = V::set(c.scale * LOG2E), never = V::set(-INFINITY);
        for (int i = 0; i < G; ++i) V::store(r.top + i * L, V::set(LOWEST)), V::store(r.sum + i * L, V::zero());
        for (int64_t start = 0; start < most; start += TILE) {
            const int n = int(most - start < TILE ? most - start : TILE);
            logits<G>(kernels, start, n, most, g);
            for (int i = 0; i < G; ++i) {
                float *x = r.scores + i * TILE * L;
                T best = never;
                for (int j = 0; j < n; ++j) {
                    T value = V::load(x + j * L);
                    if (start + n > fewest) {
                        value = V::where_reached(int(start) + j, r.visible + i * L, never, value);
                        V::store(x + j * L, value);
                    }
                    best = V::max(value, best);
                }
                const T before = V::load(r.top + i * L), now = V::max(before, V::mul(best, factor));
                const T minus = V::mul(now, V::set(-1.f));
                T total = V::mul(V::load(r.sum + i * L), V::exp2(V::add(before, minus)));
                for (int j = 0; j < n; ++j) total = V::add(total, V::exp2(V::fma(V::load(x + j * L), factor, minus)));
                V::store(r.top + i * L, now), V::store(r.sum + i * L, total);
            }
        }
        for (int i = 0; i < G * L; ++i)  // an infinite logit makes the sum NaN, but the maximum tells
            lse[i] = r.sum[i] == 0.f ? -INFINITY : r.top[i] == INFINITY ? INFINITY : r.top[i] + std::log2(r.sum[i]);
    }

    // Adds exp(logit - lse) of these groups' rows to their tokens' scores.
    template <int G> void accumulate(int g, const float *lse) {
        int64_t fewest, most;
        count_visible(c.kernel_size, c.kernel_stride, g, G, &fewest, &most);
        const T factor = V::set(c.scale * LOG2E), zero = V::zero();
        const int overlap = c.kernel_size / c.kernel_stride - 1;
        for (int64_t start = 0; start < most; start += TILE) {
            const int n = int(most - start < TILE ? most - start : TILE);
            logits<G>(a->fine, start, n, most, g);
            for (int i = 0; i < G; ++i) {
                float *x = r.scores + i * TILE * L;
                const T minus = V::mul(V::load(lse + i * L), V::set(-1.f));
                for (int j = 0; j < n; ++j) {
                    T share = V::exp2(V::fma(V::load(x + j * L), factor, minus));
                    if (start + n > fewest) share = V::where_reached(int(start) + j, r.visible + i * L, zero, share);
                    V::store(x + j * L, share);
                }
                for (int j = 0; j < n; j += L) add_heads(x + j * L, (g + i) * L, n - j < L ? n - j : L, overlap + start + j);
            }
        }
    }

    // Adds the shares [n][L] of the rows from `row` on to their tokens' scores from `at` on, head by head in order.
    void add_heads(const float *shares, int row, int n, int64_t at) {
        if (group % L == 0 && n == L) {  // one token's
            float *to = r.tokens + row / group * r.width + at;
            T lane[L];
            V::transpose(shares, lane);
            T total = row % group ? V::add(V::load(to), lane[0]) : lane[0];
#pragma GCC unroll 16
            for (int i = 1; i < L; ++i) total = V::add(total, lane[i]);
            return V::store(to, total);
        }
        T lane[L];
        V::transpose(shares, lane);
        for (int i = 0; i < L && row + i < rows; ++i) {
            float *to = r.tokens + (row + i) / group * r.width + at;
            V::store(r.turned, lane[i]);
            if ((row + i) % group == 0)
                std::memcpy(to, r.turned, sizeof(float) * n);
            else if (n == L)
                V::store(to, V::add(V::load(to), lane[i]));
            else
                for (int j = 0; j < n; ++j) to[j] += r.turned[j];
        }
    }

    template <int G> void score_groups(int g) {
        float *lse = r.lse;
        if (c.exact) {
            normalise<G>(a->fine, c.kernel_size, c.kernel_stride, g, lse);
        } else {
            normalise<G>(a->coarse, c.coarse_factor * c.kernel_size, c.coarse_factor * c.kernel_stride, g, lse);
            bool missing = false;
            for (int i = 0; i < G * L && g * L + i < rows; ++i) missing |= lse[i] == -INFINITY;
            if (missing) {  // no coarse kernel is complete yet: the exact sum takes its place
                float exact[2 * 16];
                normalise<G>(a->fine, c.kernel_size, c.kernel_stride, g, exact);
                for (int i = 0; i < G * L; ++i) lse[i] = lse[i] == -INFINITY ? exact[i] : lse[i];
            }
        }
        for (int i = 0; i < G * L; ++i)
            if (g * L + i >= rows || lse[i] == -INFINITY) lse[i] = INFINITY;  // nothing to see: all shares 0
        accumulate<G>(g, lse);
    }

    // Blocks of every token; returns true if all was done without scores (short contexts).
    void run(int32_t *out) {
        const int64_t last = position(tokens - 1) / c.block_size;
        if (last + 1 > c.budget) {
            pack_queries();
            for (int g = 0; g < groups;) {
                if (g + 2 <= groups)
                    score_groups<2>(g), g += 2;
                else
                    score_groups<1>(g), g += 1;
            }
        }
        for (int64_t i = 0; i < tokens; ++i) choose(i, out + i * c.budget);
    }

    void choose(int64_t token, int32_t *out) {
        const int64_t own = position(token) / c.block_size;
        if (own + 1 <= c.budget) {
            for (int64_t m = 0; m < c.budget; ++m) out[m] = m <= own ? int32_t(m) : -1;
            return;
        }
        float *score = r.tokens + token * r.width;
        const int64_t begin = c.init_blocks, end = own - c.window_blocks + 1;
        pool(score, kernels_seen(position(token), c.kernel_size, c.kernel_stride), begin, end);
        int64_t room = c.budget - c.init_blocks - c.window_blocks, n = 0;
        for (int64_t m = 0; m < begin; ++m) out[n++] = int32_t(m);
        // The room-th largest score, bit by bit: floats of one sign rank as their bits do.
        const uint32_t *bits = reinterpret_cast<const uint32_t *>(score);
        uint32_t threshold = 0;
        int64_t above = end - begin;
        for (uint32_t bit = 1u << 30; bit && room; bit >>= 1) {
            const uint32_t trial = threshold | bit;
            int32_t count = 0;
            for (int64_t m = begin; m < end; ++m) count += bits[m] >= trial;
            if (count >= room) threshold = trial, above = count;
            if (count == room) break;
        }
        int64_t ties = 0;
        if (above > room) {
            int64_t greater = 0;
            for (int64_t m = begin; m < end; ++m) greater += bits[m] > threshold;
            ties = room - greater;
        } else {
            ties = INT64_MAX;
        }
        for (int64_t m = begin; m < end && room; ++m) {
            if (bits[m] < threshold || (bits[m] == threshold && ties <= 0)) continue;
            if (bits[m] == threshold) --ties;
            out[n++] = int32_t(m);
        }
        for (int64_t m = end; m <= own; ++m) out[n++] = int32_t(m);
    }

    // In place: the score of block m is the largest of the kernels that touch it. Never reads what it wrote.
    void pool(float *score, int64_t seen, int64_t begin, int64_t end) const {
        const int per_block = c.block_size / c.kernel_stride, overlap = c.kernel_size / c.kernel_stride - 1;
        const float most = 3.402823466e38f;
        const float *kernels = score + overlap;
        for (int64_t m = begin; m < end; ++m) {
            int64_t from = m * per_block - overlap, to = (m + 1) * per_block;
            from = from < 0 ? 0 : from, to = to < seen ? to : seen;
            float best = 0.f;
            for (int64_t j = from; j < to; ++j) best = kernels[j] > best ? kernels[j] : best;  // NaN counts as 0
            score[m] = best < most ? best : most;
        }
    }
};

}  // namespace NATIVE_LEVEL
}  // namespace native
