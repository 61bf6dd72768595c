// Gradients of block-sparse (and dense) attention, the weights made again from the log-sum-exp.
//
// With P the weights, D = rowsum(dO ∘ O) - dlse and dS = P ∘ (dO Vᵀ - D): dQ = dS K, dK = dSᵀ Q, dV = Pᵀ dO
// (FlashAttention, arXiv 2205.14135, appendix B). dQ belongs to one unit of rows; dK and dV are summed over units in
// accumulators of the thread that does them, so that nothing is shared and the order of sums is fixed.
#pragma once
#include "args.h"
#include "attend.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

inline int64_t padded_dim(const infllm2_shape *s) { return round_up(s->dim, 16); }

// Floats of one accumulator: dK and then dV of one batch row and key-value head, [keys][padded head size] each.
inline int64_t gradient_floats(const infllm2_shape *s) { return 2 * s->keys * padded_dim(s); }

inline int64_t backward_work(const infllm2_shape *s, int64_t block_size) {
    const int64_t lanes = most_lanes(s), dim = padded_dim(s);
    return attend_work(s, block_size) +
           4 * (4 * lanes * dim + 2 * lanes + 2 * (TILE + 1) * 16 + 2 * TILE * lanes + TILE * s->dim) + 256;
}

template <class Format> struct BackwardUnit {
    using V = typename Format::Lanes;
    using T = typename V::T;
    using Source = typename Format::Source;
    using Dot = typename Format::Dot;
    using BUnit = typename Dot::Unit;
    static constexpr int L = V::L, ROWS = Format::ROWS, GROUP = TILE * L;
    const infllm2_backward_args *g;
    Unit<Format> unit;  // q, dQ (in its `out`), scratch for keys and scores
    float *grad, *q_rows, *grad_rows, *some_rows, *lse, *delta, *weights, *value_rows;
    BUnit *all_weights, *all_slopes;  // of every active row for one tile of keys
    float *gradients;                 // the accumulator
    int wide, stride;                 // vectors to a head, floats to a row of the accumulator

    BackwardUnit(const infllm2_backward_args *args, char *work, int64_t b, int64_t h, int64_t first, int64_t count, float *accumulator)
        : g(args), unit(&args->attend, work, b, h, first, count), gradients(accumulator) {
        const infllm2_shape *s = &args->attend.shape;
        const int64_t lanes = most_lanes(s), dim = padded_dim(s);
        wide = int((s->dim + L - 1) / L), stride = int(dim);
        work += attend_work(s, args->attend.block_size);
        float *p = reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(work) + 63) & ~uintptr_t(63));
        grad = p, p += lanes * dim;
        q_rows = p, p += lanes * dim;
        grad_rows = p, p += lanes * dim;
        some_rows = p, p += lanes * dim;
        lse = p, p += lanes;
        delta = p, p += lanes;
        weights = p, p += 2 * (TILE + 1) * 16;
        all_weights = reinterpret_cast<BUnit *>(p), p += TILE * lanes;
        all_slopes = reinterpret_cast<BUnit *>(p), p += TILE * lanes;
        value_rows = p;
        const int units = unit.groups * ROWS;
        std::memset(grad, 0, sizeof(float) * unit.groups * unit.depth * L);
        std::memset(q_rows, 0, sizeof(float) * wide * units * L);
        std::memset(grad_rows, 0, sizeof(float) * wide * units * L);
        for (int i = 0; i < unit.groups * L; ++i) lse[i] = INFINITY, delta[i] = 0.f;
        for (int i = 0; i < unit.rows; ++i) {
            const int64_t head = h * s->group + i % s->group, t = first + i / s->group;
            const int64_t row = (b * s->kv_heads * s->group + head) * s->queries + t;
            const infllm2_tensor &d = g->grad;
            const Source *from = static_cast<const Source *>(d.data) + b * d.batch + head * d.head + t * d.row;
            Format::pack_query(from, unit.dim, grad + ptrdiff_t(i / L) * unit.depth * L + i % L, L);
            Format::place_row(unit.query(i), unit.dim, i, units, q_rows);
            Format::place_row(from, unit.dim, i, units, grad_rows);
            // A row that sees nothing has lse -inf: made +inf, its weights are 0.
            lse[i] = g->lse[row] == -INFINITY ? INFINITY : g->lse[row] * LOG2E;
            delta[i] = g->delta[row];
        }
    }

    // Keys [start, start + n), at most a tile.
    void visit(int64_t start, int n, const uint64_t *visitors) {
        const infllm2_attend_args *a = unit.a;
        const int count = unit.find_active(start, visitors), *active = unit.r.active;
        const Source *k = static_cast<const Source *>(a->k.data) + unit.batch * a->k.batch + unit.head * a->k.head + start * a->k.row;
        const Source *v = static_cast<const Source *>(a->v.data) + unit.batch * a->v.batch + unit.head * a->v.head + start * a->v.row;
        const auto keys = Format::keys(k, a->k.row, n, unit.dim, unit.r.key_scratch);
        const auto values = Format::keys(v, a->v.row, n, unit.dim, value_rows);
        const auto pairs = typename Format::Values(k, a->k.row, n, unit.dim, unit.r.value_scratch).finish(0);
        for (int i = 0, step; i < count; i += step) {
            step = i + 2 <= count ? 2 : 1;
            int32_t least = n, most = 0;
            for (int j = 0; j < step; ++j) unit.count_seen(active[i + j], start, n, visitors, unit.r.visible + j * L, &least, &most);
            if (step == 2)
                rows_of<2>(i, count, n, keys, values, pairs, least < n);
            else
                rows_of<1>(i, count, n, keys, values, pairs, least < n);
        }
        float *to_k = gradients + start * stride, *to_v = to_k + a->shape.keys * stride;
        accumulate(all_weights, n, count, grad_rows, to_v);
        accumulate(all_slopes, n, count, q_rows, to_k);
    }

    // Weights and their slopes for G active lane groups from the i-th on, and what they add to dQ.
    template <int G> void rows_of(int i, int count, int n, const Tile<BUnit> &keys, const Tile<BUnit> &values, const Tile<BUnit> &pairs, bool masked) {
        const ptrdiff_t group = unit.r.active[i], apart = unit.r.active[i + G - 1] - group, size = ptrdiff_t(unit.depth) * L;
        float *weight_rows = weights, *slope_rows = unit.r.scores;
        scores<Format, G>(keys, n, unit.r.q + group * size, apart * size, unit.depth, weight_rows);
        scores<Format, G>(values, n, grad + group * size, apart * size, unit.depth, slope_rows);
        const float scaling = unit.a->scale;
        const T factor = V::set(scaling * LOG2E), scale = V::set(scaling), none = V::zero(), minus_one = V::set(-1.f);
        for (int j = 0; j < G; ++j) {
            float *p = weight_rows + j * GROUP, *ds = slope_rows + j * GROUP;
            const T minus = V::mul(V::load(lse + (group + j * apart) * L), minus_one);
            const T less = V::mul(V::load(delta + (group + j * apart) * L), minus_one);
            for (int key = 0; key < n; ++key) {
                T weight = V::template exp2<Format::EXP_DEGREE>(V::fma(V::load(p + key * L), factor, minus));
                T slope = V::mul(V::mul(weight, V::add(V::load(ds + key * L), less)), scale);
                if (masked) {  // a masked key may hold anything, NaN too
                    weight = V::where_reached(key, unit.r.visible + j * L, none, weight);
                    slope = V::where_reached(key, unit.r.visible + j * L, none, slope);
                }
                V::store(p + key * L, weight), V::store(ds + key * L, slope);
            }
            Format::pack_rows(p, n, all_weights + (i + j) * ROWS, count * ROWS);
            Format::pack_rows(ds, n, all_slopes + (i + j) * ROWS, count * ROWS);
            Format::pack_weights(ds, n);
        }
        broadcast_gemm<V, Dot, G, 1>(pairs.data, pairs.column, pairs.step, slope_rows, GROUP, Format::units(n), unit.dim,
                                     unit.r.out + group * unit.dim * L, apart * unit.dim * L, true);
    }

    // to[key][d] += sum over active rows of s[key][row] · x[row][d]
    void accumulate(const BUnit *s, int n, int count, const float *x, float *to) {
        const int units = count * ROWS;
        const ptrdiff_t part = ptrdiff_t(units) * L, size = ROWS * L;
        if (count < unit.groups) {
            for (int j = 0; j < wide; ++j)
                for (int i = 0; i < count; ++i)
                    std::memcpy(some_rows + j * part + i * size, x + (ptrdiff_t(j) * unit.groups + unit.r.active[i]) * size, sizeof(float) * size);
            x = some_rows;
        }
        int j = 0;
        for (; j + 2 <= wide; j += 2)
            broadcast_gemm<V, Dot, 2>(s, units, 1, x + j * part, part, units, n, to + j * L, L, true, Nothing(), stride);
        for (; j < wide; ++j)
            broadcast_gemm<V, Dot, 1>(s, units, 1, x + j * part, part, units, n, to + j * L, L, true, Nothing(), stride);
    }

    void visit_range(int64_t start, int64_t stop, const uint64_t *visitors) {
        for (; start < stop; start += TILE) visit(start, int(stop - start < TILE ? stop - start : TILE), visitors);
    }

    // The blocks that any token visits, or all keys for null.
    void visit_all(const uint64_t (*visitors)[2]) {
        const int64_t end = unit.position(unit.rows - 1) + 1, size = unit.a->block_size;
        if (!visitors) return visit_range(0, end, nullptr);
        for (int64_t m = 0; m * size < end; ++m)
            if (visitors[m][0] | visitors[m][1]) visit_range(m * size, (m + 1) * size < end ? (m + 1) * size : end, visitors[m]);
    }

    void finish() const {
        const infllm2_shape &s = unit.a->shape;
        for (int i = 0; i < unit.rows; ++i) {
            const int64_t head = unit.head * s.group + i % s.group, t = unit.first + i / s.group;
            Source *out = static_cast<Source *>(g->grad_q) + ((unit.batch * s.kv_heads * s.group + head) * s.queries + t) * unit.dim;
            const float *from = unit.r.out + ptrdiff_t(i / L) * unit.dim * L + i % L;
            for (int d = 0; d < unit.dim; ++d) from_float(from[d * L], out + d);
        }
    }
};

// With `slots` = 1 whole pairs of batch row and head belong to a thread; with slots = nth each thread has an
// accumulator of its own for every pair.
template <class Narrow, class Wide> void backward(const infllm2_backward_args *g, int32_t ith, int32_t nth) {
    const infllm2_attend_args *a = &g->attend;
    const infllm2_shape &s = a->shape;
    const int64_t floats = gradient_floats(&s), tiles = (s.queries + a->tile - 1) / a->tile;
    char *work = a->work + ith * a->work_stride;
    for (int64_t pair = 0; pair < s.batch * s.kv_heads; ++pair) {
        if (g->slots == 1 && pair % nth != ith) continue;
        float *to = g->gradients + (pair * g->slots + (g->slots == 1 ? 0 : ith)) * floats;
        std::memset(to, 0, sizeof(float) * floats);
        for (int64_t tile = g->slots == 1 ? 0 : ith; tile < tiles; tile += g->slots == 1 ? 1 : nth) {
            const int64_t first = tile * a->tile, count = s.queries - first < a->tile ? s.queries - first : a->tile;
            const int64_t b = pair / s.kv_heads, h = pair % s.kv_heads;
            uint64_t(*visitors)[2] = a->blocks ? rows_in(work, &s).visitors : nullptr;
            if (visitors) find_visitors(s, a->block_size, a->blocks + (pair * s.queries + first) * a->width, a->width, first, count, visitors);
            const auto one = [&](auto &&unit) { unit.visit_all(visitors), unit.finish(); };
            if (count * s.group <= Narrow::Lanes::L)
                one(BackwardUnit<Narrow>(g, work, b, h, first, count, to));
            else
                one(BackwardUnit<Wide>(g, work, b, h, first, count, to));
        }
    }
}

// Sums of the accumulators, to dK and dV [B, K, S, D].
template <class Format> void gather(const infllm2_backward_args *g, int32_t ith, int32_t nth) {
    using Source = typename Format::Source;
    const infllm2_shape &s = g->attend.shape;
    const int64_t floats = gradient_floats(&s), stride = padded_dim(&s);
    for (int64_t item = ith; item < s.batch * s.kv_heads * s.keys; item += nth) {
        const int64_t pair = item / s.keys, key = item % s.keys;
        const float *from = g->gradients + pair * g->slots * floats + key * stride;
        for (int which = 0; which < 2; ++which, from += floats / 2) {
            Source *out = static_cast<Source *>(which ? g->grad_v : g->grad_k) + item * s.dim;
            for (int64_t d = 0; d < s.dim; ++d) {
                float sum = 0.f;
                for (int64_t slot = 0; slot < g->slots; ++slot) sum += from[slot * floats + d];
                from_float(sum, out + d);
            }
        }
    }
}

}  // namespace NATIVE_LEVEL
}  // namespace native
