// Softmax attention of bfloat16 rows on tiles: the same sums as rows.hpp, with query rows as the rows of tiles.
//
// Keys become columns of tiles by turning 16 x 16 units around, values by pairing neighbours; both once for all rows of a
// unit of work. Then, for 32 rows at a time: logits, weights, weights · values, the sums of which stay in float32 in
// memory. Each row's weights are relative to a logit that was once its largest, and is replaced by the largest so far only when a
// chunk's weights add up to too much: sums are seldom rescaled, and in most chunks no maximum is looked for.
#pragma once
#include "amx.hpp"
#include "rows.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

constexpr int CHUNK = 128;  // keys at a time

inline int64_t tile_dim(const native_shape *s) { return round_up(s->dim, 32); }

// Bytes a thread, whatever the level: what rows.hpp needs, and behind it what is needed here.
inline int64_t attend_work(const native_shape *s, int64_t block_size) {
    const int64_t rows = most_lanes(s) + 32, dim = tile_dim(s), bf16_rows = s->dtype == 1;
    return round_up(attend_rows_work(s, block_size), 64) + bf16_rows * (rows * (6 * dim + 4 * (16 + 2)) + 2 * 3 * CHUNK * dim + (4 + 2) * 32 * CHUNK + 64);
}

#if defined(__AMX_BF16__)

// 16 rows of 16 units, from wherever they are, to 16 units of 16 rows.
inline void turn_units(const char *const *rows, ptrdiff_t offset, char *out) {
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; ++quarter) {
        const ptrdiff_t at = offset + 16 * quarter;
        __m512i a[4], b[4];
        const auto part = [&](int row) { return _mm_loadu_si128((const __m128i *)(rows[row] + at)); };
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            a[i] = _mm512_castsi128_si512(part(i));
            a[i] = _mm512_inserti32x4(a[i], part(i + 4), 1);
            a[i] = _mm512_inserti32x4(a[i], part(i + 8), 2);
            a[i] = _mm512_inserti32x4(a[i], part(i + 12), 3);
        }
        b[0] = _mm512_unpacklo_epi32(a[0], a[1]), b[1] = _mm512_unpackhi_epi32(a[0], a[1]);
        b[2] = _mm512_unpacklo_epi32(a[2], a[3]), b[3] = _mm512_unpackhi_epi32(a[2], a[3]);
        char *to = out + 256 * quarter;
        _mm512_store_si512(to, _mm512_unpacklo_epi64(b[0], b[2])), _mm512_store_si512(to + 64, _mm512_unpackhi_epi64(b[0], b[2]));
        _mm512_store_si512(to + 128, _mm512_unpacklo_epi64(b[1], b[3])), _mm512_store_si512(to + 192, _mm512_unpackhi_epi64(b[1], b[3]));
    }
}

// Two rows of 32 numbers to 32 pairs, 16 of them in each of two tiles.
inline void pair_rows(const bf16 *even, const bf16 *odd, char *first, char *second) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
    _mm512_store_si512(first, _mm512_permutex2var_epi16(a, low, b));
    _mm512_store_si512(second, _mm512_permutex2var_epi16(a, high, b));
}

template <class Cached> struct TileUnit {
    static constexpr int64_t TILE_BYTES = 1024;
    const Tiles configured;
    const native_attend_args *a;
    int64_t batch, head, first;
    int rows, groups, dim, steps, parts;  // of 16 rows, of 32 and 16 numbers of a head
    // Tiles: q [groups][steps], out [groups][2 steps], keys [CHUNK / 16][steps], values [CHUNK / 32][2 steps], scores
    // [2][CHUNK / 16], weights [2][CHUNK / 32].
    char *q, *keys, *values, *scores, *weights;
    float *out, *sums, *top;  // sums: [rows][16]
    bf16 *padded;             // rows of a chunk, where they need widening or zeros behind them
    int32_t *active;
    uint64_t (*visitors)[2];

    TileUnit(const native_attend_args *args, char *work, int64_t b, int64_t h, int64_t t, int64_t count)
        : a(args), batch(b), head(h), first(t), rows(int(count * args->shape.group)), groups((rows + 15) / 16), dim(int(args->shape.dim)) {
        const native_shape &s = a->shape;
        const int64_t wide = tile_dim(&s), most = most_lanes(&s) + 32;
        steps = int(wide / 32), parts = (dim + 15) / 16;
        visitors = rows_in(work, &s).visitors;
        char *p = work + round_up(attend_rows_work(&s, a->block_size), 64);
        p = reinterpret_cast<char *>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t(63));
        const auto take = [&](int64_t bytes) { return std::exchange(p, p + bytes); };
        scores = take(4 * 32 * CHUNK), weights = take(2 * 32 * CHUNK);
        keys = take(2 * CHUNK * wide), values = take(2 * CHUNK * wide);
        q = take(2 * most * wide), out = reinterpret_cast<float *>(take(4 * most * wide));
        sums = reinterpret_cast<float *>(take(4 * most * 16)), top = reinterpret_cast<float *>(take(4 * most));
        active = reinterpret_cast<int32_t *>(take(4 * most)), padded = reinterpret_cast<bf16 *>(take(2 * CHUNK * wide));
        const int64_t all = 16 * groups;
        std::memset(q, 0, 2 * all * wide), std::memset(out, 0, 4 * all * wide), std::memset(sums, 0, 4 * all * 16);
        if (wide > dim || sizeof(Cached) == 1) std::memset(padded, 0, 2 * CHUNK * wide);
        for (int i = 0; i < all; ++i) top[i] = LOWEST;
        for (int i = 0; i < rows; ++i) {
            const bf16 *from = static_cast<const bf16 *>(a->q.data) + batch * a->q.batch + (head * s.group + i % s.group) * a->q.head + (first + i / s.group) * a->q.row;
            for (int d = 0; d < dim; d += 32)
                std::memcpy(q + ((i / 16) * steps + d / 32) * TILE_BYTES + i % 16 * 64, from + d, 2 * (dim - d < 32 ? dim - d : 32));
        }
    }

    int64_t position(int row) const { return a->shape.keys - a->shape.queries + first + row / a->shape.group; }

    // Rows [start, start + n) of a cache: where each of them is, with numbers up to the end of a tile.
    void locate(const native_tensor &x, int64_t start, int n, const char **at) const {
        const Cached *from = static_cast<const Cached *>(x.data) + batch * x.batch + head * x.head + start * x.row;
        const bool copy = dim % 32 || sizeof(Cached) == 1;
        for (int i = 0; i < n; ++i) {
            at[i] = reinterpret_cast<const char *>(copy ? reinterpret_cast<const Cached *>(padded + int64_t(i) * steps * 32) : from + i * x.row);
            if constexpr (sizeof(Cached) == 1)
                widen_row(from + i * x.row, dim, padded + int64_t(i) * steps * 32);
            else if (copy)
                std::memcpy(padded + int64_t(i) * steps * 32, from + i * x.row, 2 * dim);
        }
        alignas(64) static const char none[64 * 64] = {};
        for (int i = n; i < CHUNK; ++i) at[i] = none;
    }

    // Keys and values [start, start + n) into tiles; what is past the end is 0.
    void pack(int64_t start, int n) {
        const char *at[CHUNK];
        const int count = n + 31 & ~31;
        locate(a->k, start, n, at);
        for (int i = 0; i < count; i += 16)
            for (int d = 0; d < steps; ++d) turn_units(at + i, i < n ? 64 * d : 0, keys + (i / 16 * steps + d) * TILE_BYTES);
        locate(a->v, start, n, at);
        for (int i = 0; i < count; i += 2)
            for (int d = 0; d < steps; ++d) {
                char *to = values + (i / 32 * 2 * steps + 2 * d) * TILE_BYTES + i % 32 / 2 * 64;
                pair_rows((const bf16 *)(at[i] + 64 * d), (const bf16 *)(at[i + 1] + 64 * d), to, to + TILE_BYTES);
            }
    }

    // Logits of two groups of rows and `count` keys, a multiple of 32.
    void multiply_keys(int g0, int g1, int count) {
        const char *a0 = q + int64_t(g0) * steps * TILE_BYTES, *a1 = q + int64_t(g1) * steps * TILE_BYTES;
        for (int i = 0; i < count; i += 32) {
            const char *b0 = keys + i / 16 * steps * TILE_BYTES, *b1 = b0 + steps * TILE_BYTES;
            tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
            for (int d = 0; d < steps; ++d) product_of(a0, a1, b0, b1, d * TILE_BYTES);
            char *to = scores + i / 16 * TILE_BYTES, *other = to + CHUNK / 16 * TILE_BYTES;
            tile_store<0>(to, 64), tile_store<1>(to + TILE_BYTES, 64), tile_store<2>(other, 64), tile_store<3>(other + TILE_BYTES, 64);
        }
    }
    // C0, C1 and C2, C3 += A0 and A1 · B0, B1.
    static void product_of(const char *a0, const char *a1, const char *b0, const char *b1, ptrdiff_t at) {
        tile_load<4>(a0 + at, 64), tile_load<6>(b0 + at, 64), tile_dot_bf16<0, 4, 6>();
        tile_load<7>(b1 + at, 64), tile_dot_bf16<1, 4, 7>();
        tile_load<5>(a1 + at, 64), tile_dot_bf16<2, 5, 6>(), tile_dot_bf16<3, 5, 7>();
    }

    // Adds the weights of two groups of rows times `count` values.
    void multiply_values(int g0, int g1, int count) {
        const char *a0 = weights, *a1 = weights + CHUNK / 32 * TILE_BYTES;
        char *o0 = reinterpret_cast<char *>(out) + int64_t(g0) * 2 * steps * TILE_BYTES, *o1 = reinterpret_cast<char *>(out) + int64_t(g1) * 2 * steps * TILE_BYTES;
        for (int d = 0; d < 2 * steps; d += 2) {
            char *c0 = o0 + d * TILE_BYTES, *c1 = o1 + d * TILE_BYTES;
            tile_load<0>(c0, 64), tile_load<1>(c0 + TILE_BYTES, 64), tile_load<2>(c1, 64), tile_load<3>(c1 + TILE_BYTES, 64);
            for (int i = 0; i < count / 32; ++i) {
                const char *b = values + (i * 2 * steps + d) * TILE_BYTES;
                product_of(a0 + i * TILE_BYTES, a1 + i * TILE_BYTES, b, b + TILE_BYTES, 0);
            }
            tile_store<0>(c0, 64), tile_store<1>(c0 + TILE_BYTES, 64), tile_store<2>(c1, 64), tile_store<3>(c1 + TILE_BYTES, 64);
        }
    }

    // Weights of a row's `count` logits, of which it sees `seen`, and their sum as rounded to bfloat16, so that rounding a
    // weight far larger than the others does no harm; to `to`, tiles apart.
    template <bool MASKED> static __m512 weigh(const float *x, int count, int seen, float factor, float minus, char *to) {
        using V = Zmm;
        const __m512 by = V::set(factor), less = V::set(minus);
        const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
        __m512 sum = V::zero();
        const auto weight = [&](int i) {
            const __m512 y = V::fma(V::load(x + i * 256), by, less);
            const __m512 f = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
            using P = Polynomial<3>;
            const __m512 p = V::fma(V::fma(V::fma(V::set(P::at[3]), f, V::set(P::at[2])), f, V::set(P::at[1])), f, V::set(P::at[0]));
            if (!MASKED) return _mm512_scalef_ps(p, y);
            const int here = seen - 16 * i;
            return _mm512_maskz_scalef_ps(here >= 16 ? 0xffff : here <= 0 ? 0 : (1 << here) - 1, p, y);
        };
        for (int i = 0; i < count / 16; i += 2) {
            const __m512 even = weight(i), odd = weight(i + 1);
            const __m512bh both = _mm512_cvtne2ps_pbh(odd, even);
            sum = _mm512_dpbf16_ps(sum, both, ones);
            _mm512_store_si512(to + i / 2 * TILE_BYTES, (__m512i)both);
        }
        return sum;
    }

    // Weights of one row of group g.
    void weigh_row(int g, int which, int r, int count, int seen) {
        using V = Zmm;
        constexpr float MUCH = 4096.f;
        const int row = 16 * g + r;
        const float *x = reinterpret_cast<const float *>(scores + which * CHUNK / 16 * TILE_BYTES) + 16 * r;
        char *to = weights + which * CHUNK / 32 * TILE_BYTES + 64 * r;
        const float factor = a->scale * LOG2E;
        const auto weighed = [&] {
            return seen < count ? weigh<true>(x, count, seen, factor, -top[row], to) : weigh<false>(x, count, seen, factor, -top[row], to);
        };
        __m512 sum = weighed();
        if (__builtin_expect(_mm512_cmp_ps_mask(sum, V::set(MUCH), _CMP_NLE_UQ), 0)) {
            raise(g, r, x, count, seen, factor);
            sum = weighed();
        }
        V::store(sums + 16 * row, V::add(V::load(sums + 16 * row), sum));
    }

    // Makes a row's weights relative to its largest logit so far.
    __attribute__((noinline)) void raise(int g, int r, const float *x, int count, int seen, float factor) {
        using V = Zmm;
        const int row = 16 * g + r;
        __m512 best = V::set(-INFINITY);
        for (int i = 0; i < count && i < seen; i += 16) {
            const __mmask16 here = seen - i >= 16 ? 0xffff : (1 << (seen - i)) - 1;
            best = _mm512_mask_max_ps(best, here, V::load(x + i * 16), best);
        }
        const float most = _mm512_reduce_max_ps(best) * factor, before = top[row];
        if (!(most > before)) return;
        top[row] = most;
        const __m512 shrink = V::exp2(V::set(before - most));
        V::store(sums + 16 * row, V::mul(V::load(sums + 16 * row), shrink));
        float *o = out + int64_t(g) * 2 * steps * 256 + 16 * r;
        for (int d = 0; d < parts; ++d) V::store(o + 256 * d, V::mul(V::load(o + 256 * d), shrink));
    }

    // Keys [start, start + n), n at most a chunk, of the tokens whose bits are set in `who` (null: all).
    void visit(int64_t start, int n, const uint64_t *who) {
        const int heads = int(a->shape.group);
        int count = 0;
        for (int g = 0; g < groups; ++g) {
            const int last = 16 * g + 15 < rows ? 16 * g + 15 : rows - 1, token = 16 * g / heads;
            if (position(last) >= start && (!who || any_of(who, token, last / heads - token + 1))) active[count++] = g;
        }
        if (!count) return;
        pack(start, n);
        for (int i = 0; i < count; i += 2) {
            const int g[2] = {active[i], active[i + 1 < count ? i + 1 : i]};
            const int last = 16 * g[1] + 15 < rows ? 16 * g[1] + 15 : rows - 1;
            const int64_t seen = position(last) + 1 - start;
            const int some = (seen < n ? int(seen) : n) + 31 & ~31;
            multiply_keys(g[0], g[1], some);
            for (int which = 0; which < (i + 1 < count ? 2 : 1); ++which)
                for (int r = 0; r < 16; ++r) {
                    const int row = 16 * g[which] + r, token = row / heads;
                    int64_t sees = row < rows ? position(row) + 1 - start : 0;
                    if (who && row < rows && !(who[token >> 6] >> (token & 63) & 1)) sees = 0;
                    sees = sees < 0 ? 0 : sees < n ? sees : n;
                    weigh_row(g[which], which, r, some, int(sees));
                }
            if (i + 1 == count) {  // nobody else: the second group's sums are not kept
                multiply_values(g[0], groups, some);
            } else {
                multiply_values(g[0], g[1], some);
            }
        }
    }

    void visit_range(int64_t start, int64_t stop, const uint64_t *who) {
        for (; start < stop; start += CHUNK) visit(start, int(stop - start < CHUNK ? stop - start : CHUNK), who);
    }

    void visit_all() { visit_range(0, position(rows - 1) + 1, nullptr); }

    void visit_union() {
        const int64_t end = position(rows - 1) + 1, size = a->block_size;
        for (int64_t m = 0; m * size < end; ++m)
            if (visitors[m][0] | visitors[m][1]) visit_range(m * size, (m + 1) * size < end ? (m + 1) * size : end, visitors[m]);
    }

    void finish() const {
        using V = Zmm;
        const native_shape &s = a->shape;
        for (int i = 0; i < rows; ++i) {
            const int64_t h = head * s.group + i % s.group, t = first + i / s.group, row = (batch * s.kv_heads * s.group + h) * s.queries + t;
            const float total = _mm512_reduce_add_ps(V::load(sums + 16 * i));
            const __m512 inverse = V::set(total == 0.f ? 0.f : 1.f / total);
            bf16 *to = static_cast<bf16 *>(a->out) + row * dim;
            const float *o = out + int64_t(i / 16) * 2 * steps * 256 + i % 16 * 16;
            for (int d = 0; d < dim; d += 16) {
                const __m256i y = (__m256i)_mm512_cvtneps_pbh(V::mul(V::load(o + d * 16), inverse));
                _mm256_mask_storeu_epi16(to + d, dim - d >= 16 ? 0xffff : (1 << (dim - d)) - 1, y);
            }
            if (a->lse) a->lse[row] = total == 0.f ? -INFINITY : (top[i] + std::log2(total)) * LN2;
        }
    }
};
#endif

}  // namespace NATIVE_LEVEL
}  // namespace native
