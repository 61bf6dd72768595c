// Copied from common/native/few_heads.hpp by common/sync.py: change it there.
// One token's attention where few query heads share their keys: lanes run along the head size.
//
// The kernel of rows.hpp keeps a head in each lane, and with three heads most lanes idle: it then computes for longer
// than memory takes to deliver. Here a vector holds 32 numbers of a key; sixteen keys' products are summed across lanes
// together. Needs bfloat16 dot products and a head size of 32, 64, 96 or 128.
#pragma once
#include "formats.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

#if defined(__AVX512BF16__)
constexpr int MOST_FEW = 4;  // heads: with more, a head in each lane is faster

// Lane i: the sum of the lanes of a[i].
inline __m512 sums_of(const __m512 *a) {
    __m512 b[8], c[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512d x = _mm512_castps_pd(b[2 * i]), y = _mm512_castps_pd(b[2 * i + 1]);
        c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    const auto halves = [](__m512 x, __m512 y) { return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd)); };
    return halves(halves(c[0], c[1]), halves(c[2], c[3]));
}

// Rows as the products want them: where they lie, or widened from int8 with their factors left for later.
struct TileRows {
    const bf16 *data;
    ptrdiff_t row;
    const float *scales;  // null: 1
    const bf16 *at(int i) const { return data + i * row; }
};
inline TileRows tile_rows(const bf16 *x, ptrdiff_t row, int, int, float *) { return {x, row, nullptr}; }
inline TileRows tile_rows(const int8_t *x, ptrdiff_t row, int n, int dim, float *scratch) {
    bf16 *wide = reinterpret_cast<bf16 *>(scratch);
    float *scales = scratch + TILE * dim / 2;
    const auto floats = [](const int8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))); };
    for (int i = 0; i < n; ++i) {
        const int8_t *from = x + i * row;
        for (int d = 0; d < dim; d += 32)
            _mm512_storeu_si512(wide + i * dim + d, (__m512i)_mm512_cvtne2ps_pbh(floats(from + d + 16), floats(from + d)));
        scales[i] = row_scale(from, dim);
    }
    for (int i = n; i < (n + 15 & ~15); ++i) scales[i] = 0.f;
    return {wide, dim, scales};
}

// Asks for the `bytes` of 64 rows, a little at each of `steps`: all at once they would wait for each other, and what is
// computed then for them.
struct Ask {
    const char *next;
    ptrdiff_t bytes, steps, due = 0;
    Ask(const char *from, ptrdiff_t row_bytes, ptrdiff_t count) : next(from), bytes(row_bytes), steps(count) {}
    void step() {
        for (due += bytes; due >= steps; due -= steps, next += 64) __builtin_prefetch(next);
    }
};

// G heads of head size 32 D.
template <int G, int D> struct FewHeads {
    static constexpr int DIM = 32 * D;
    __m512i q[G][D];
    __m512 sum[G];
    float top[G], factor;
    alignas(64) float out[G][DIM];
    alignas(64) bf16 weights[G][TILE];

    template <class Query> FewHeads(Query query, float scale) : factor(scale) {
        for (int g = 0; g < G; ++g) {
            for (int d = 0; d < D; ++d) q[g][d] = _mm512_loadu_si512(query(g) + 32 * d);
            sum[g] = _mm512_setzero_ps(), top[g] = LOWEST;
            for (float &x : out[g]) x = 0.f;
        }
    }

    // n keys; those of the next tile, `next_keys` and `next_values`, are asked for meanwhile.
    void visit(const TileRows &k, const TileRows &v, int n, const char *next_keys, const char *next_values, ptrdiff_t row_bytes) {
        Ask keys(next_keys, row_bytes, G * TILE), values(next_values, row_bytes, D * TILE / 2);
        for (int g = 0; g < G; ++g) weigh(g, k, v.scales, n, keys);
        add(v, n, values);
    }

    // Weights of the tile's keys for head g.
    void weigh(int g, const TileRows &k, const float *value_scales, int n, Ask &ask) {
        using V = Zmm;
        __m512 score[TILE / 16], best = V::set(-INFINITY);
        const int parts = (n + 15) / 16;
        for (int p = 0; p < parts; ++p) {
            __m512 products[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                const int key = 16 * p + i;
                const bf16 *row = k.at(key < n ? key : n - 1);
                ask.step();
                products[i] = V::zero();
#pragma GCC unroll 4
                for (int d = 0; d < D; ++d)
                    products[i] = _mm512_dpbf16_ps(products[i], (__m512bh)_mm512_loadu_si512(row + 32 * d), (__m512bh)q[g][d]);
            }
            __m512 s = sums_of(products);
            if (k.scales) s = V::mul(s, V::load(k.scales + 16 * p));
            const int here = n - 16 * p;
            if (here < 16) s = _mm512_mask_mov_ps(V::set(-INFINITY), __mmask16((1u << here) - 1), s);
            score[p] = s;
            best = V::max(s, best);
        }
        const float most = _mm512_reduce_max_ps(best) * factor, now = most > top[g] ? most : top[g];
        if (now > top[g]) {
            float shrinks[16];
            V::store(shrinks, V::exp2(V::set(top[g] - now)));
            const __m512 shrink = V::set(shrinks[0]);
            sum[g] = V::mul(sum[g], shrink);
            for (int d = 0; d < DIM; d += 16) V::store(out[g] + d, V::mul(V::load(out[g] + d), shrink));
            top[g] = now;
        }
        for (int p = 0; p < parts; ++p) {
            __m512 weight = V::template exp2<3>(V::fma(score[p], V::set(factor), V::set(-now)));
            sum[g] = V::add(sum[g], weight);
            if (value_scales) weight = V::mul(weight, V::load(value_scales + 16 * p));
            _mm256_storeu_si256((__m256i *)(weights[g] + 16 * p), (__m256i)_mm512_cvtneps_pbh(weight));
        }
    }

    // out += weights * values, two keys at a time.
    void add(const TileRows &v, int n, Ask &ask) {
        for (int d = 0; d < D; ++d) {
            __m512 acc[G][2];
            for (int g = 0; g < G; ++g) acc[g][0] = _mm512_load_ps(out[g] + 32 * d), acc[g][1] = _mm512_load_ps(out[g] + 32 * d + 16);
            for (int i = 0; i < n; i += 2) {
                ask.step();
                const __m512i even = _mm512_loadu_si512(v.at(i) + 32 * d), odd = _mm512_loadu_si512(v.at(i + 1 < n ? i + 1 : i) + 32 * d);
                const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(even, odd), high = (__m512bh)_mm512_unpackhi_epi16(even, odd);
#pragma GCC unroll 4
                for (int g = 0; g < G; ++g) {
                    int32_t pair;
                    std::memcpy(&pair, weights[g] + i, 4);
                    const __m512bh two = (__m512bh)_mm512_set1_epi32(pair);
                    acc[g][0] = _mm512_dpbf16_ps(acc[g][0], low, two), acc[g][1] = _mm512_dpbf16_ps(acc[g][1], high, two);
                }
            }
            for (int g = 0; g < G; ++g) _mm512_store_ps(out[g] + 32 * d, acc[g][0]), _mm512_store_ps(out[g] + 32 * d + 16, acc[g][1]);
        }
    }

    // Unfinished sums as rows.hpp has them: a head in each of L lanes.
    void put(float *to, float *tops, float *sums, int L) const {
        for (int g = 0; g < G; ++g) {
            tops[g] = top[g], sums[g] = _mm512_reduce_add_ps(sum[g]);
            for (int d = 0; d < DIM; ++d) to[d * L + g] = out[g][position(d)];
        }
    }
    // Where number d is: unpacking takes four from each 128 bits, first the lower ones.
    static int position(int d) { return d & ~31 | (d >> 2 & 1) << 4 | (d >> 3 & 3) << 2 | d & 3; }
};

// Calls f with the kernel for `heads` of `dim`; false where there is none.
template <class Query, class F> inline bool with_few_heads(int64_t heads, int dim, Query query, float scale, F f) {
    const auto run = [&](auto g, auto d) {
        FewHeads<decltype(g)::value, decltype(d)::value> few(query, scale);
        f(few);
        return true;
    };
    using One = std::integral_constant<int, 1>;
    using Two = std::integral_constant<int, 2>;
    using Three = std::integral_constant<int, 3>;
    using Four = std::integral_constant<int, 4>;
    const auto sized = [&](auto g) {
        return dim == 32 ? run(g, One()) : dim == 64 ? run(g, Two()) : dim == 96 ? run(g, Three()) : dim == 128 ? run(g, Four()) : false;
    };
    return heads == 1 ? sized(One()) : heads == 2 ? sized(Two()) : heads == 3 ? sized(Three()) : heads == 4 ? sized(Four()) : false;
}
#endif

}  // namespace NATIVE_LEVEL
}  // namespace native
