// Copied from common/native/few_floats.hpp by common/sync.py: change it there.
// One token's attention where few query heads share their keys, in floats: lanes run along the head size, as in
// few_heads.hpp, for caches that are floats or become floats as they are read, and processors without bfloat16 products.
//
// The kernel of rows.hpp keeps a head in each lane: with three heads and eight lanes most would idle, and keys would be
// widened in memory first.
#pragma once
#include "formats.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

#if defined(__AVX2__)
constexpr int MOST_FEW_FLOATS = 4;  // heads: with more, a head in each lane is faster
constexpr int MOST_FEW_DIM = 256;

inline __m256 widened(const float *p, Ymm) { return _mm256_loadu_ps(p); }
inline __m256 widened(const bf16 *p, Ymm) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
inline __m256 widened(const int8_t *p, Ymm) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))); }
#if defined(__AVX512F__)
inline __m512 widened(const float *p, Zmm) { return _mm512_loadu_ps(p); }
inline __m512 widened(const bf16 *p, Zmm) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
inline __m512 widened(const int8_t *p, Zmm) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))); }
#endif

// G heads of `dim` numbers, a multiple of L; cached rows are `row` elements apart.
template <class Cached, int G, int EXP_DEGREE> struct FewFloats {
    using V = Wide;
    using T = typename V::T;
    static constexpr int L = V::L;
    static constexpr bool CODES = std::is_same<Cached, int8_t>::value;
    int dim;
    ptrdiff_t row;
    float factor, top[G], sum[G];
    alignas(64) float q[G][MOST_FEW_DIM], out[G][MOST_FEW_DIM], weights[G][TILE];

    template <class Query> FewFloats(Query query, int head_size, ptrdiff_t apart, float scale) : dim(head_size), row(apart), factor(scale) {
        for (int g = 0; g < G; ++g) {
            for (int d = 0; d < dim; ++d) q[g][d] = to_float(query(g)[d]), out[g][d] = 0.f;
            top[g] = LOWEST, sum[g] = 0.f;
        }
    }

    // n keys; those of the next tile, `next_keys` and `next_values`, are asked for meanwhile.
    void visit(const Cached *k, const Cached *v, int n, const Cached *next_keys, const Cached *next_values) {
        score(k, n, next_keys);
        for (int g = 0; g < G; ++g) weigh(g, v, n);
        add(v, n, next_values);
    }

    void ask(const Cached *next, int i) const {
        const char *line = reinterpret_cast<const char *>(next + i * row);
        for (ptrdiff_t at = 0; at < ptrdiff_t(dim * sizeof(Cached)); at += 64) __builtin_prefetch(line + at);
    }

    // Products of L keys with all heads, and their sums across lanes, into `weights`.
    void score(const Cached *k, int n, const Cached *next) {
        for (int first = 0; first < n; first += L) {
            alignas(64) float products[G][L * L];
            for (int i = 0; i < L; i += 2) {  // two keys share the loads of queries
                const int key = first + i;
                const Cached *x = k + (key < n ? key : n - 1) * row, *y = k + (key + 1 < n ? key + 1 : n - 1) * row;
                T even[G], odd[G];
#pragma GCC unroll 4
                for (int g = 0; g < G; ++g) even[g] = odd[g] = V::zero();
                for (int d = 0; d < dim; d += L) {
                    const T a = widened(x + d, V()), b = widened(y + d, V());
#pragma GCC unroll 4
                    for (int g = 0; g < G; ++g) {
                        const T query = V::load(q[g] + d);
                        even[g] = V::fma(a, query, even[g]), odd[g] = V::fma(b, query, odd[g]);
                    }
                }
                if (key < n) ask(next, key);
                if (key + 1 < n) ask(next, key + 1);
#pragma GCC unroll 4
                for (int g = 0; g < G; ++g) V::store(products[g] + i * L, even[g]), V::store(products[g] + (i + 1) * L, odd[g]);
            }
            for (int g = 0; g < G; ++g) {
                T part[L];
                V::transpose(products[g], part);
#pragma GCC unroll 4
                for (int half = L / 2; half; half /= 2)
#pragma GCC unroll 8
                    for (int i = 0; i < half; ++i) part[i] = V::add(part[i], part[i + half]);
                V::store(weights[g] + first, part[0]);
            }
        }
        const int end = (n + L - 1) / L * L;
        for (int g = 0; g < G; ++g) {
            if constexpr (CODES)
                for (int i = 0; i < n; ++i) weights[g][i] *= row_scale(k + i * row, dim);
            for (int i = n; i < end; ++i) weights[g][i] = -INFINITY;
        }
    }

    // Scores become weights.
    void weigh(int g, const Cached *v, int n) {
        const int end = (n + L - 1) / L * L;
        T best = V::set(-INFINITY);
        for (int i = 0; i < end; i += L) best = V::max(V::load(weights[g] + i), best);
        float lanes[L], most = -INFINITY;
        V::store(lanes, best);
        for (float x : lanes) most = x > most ? x : most;
        const float now = most * factor > top[g] ? most * factor : top[g];
        if (now > top[g]) {
            V::store(lanes, V::exp2(V::set(top[g] - now)));
            sum[g] *= lanes[0], top[g] = now;
            for (int d = 0; d < dim; d += L) V::store(out[g] + d, V::mul(V::load(out[g] + d), V::set(lanes[0])));
        }
        T total = V::zero();
        for (int i = 0; i < end; i += L) {
            const T weight = V::template exp2<EXP_DEGREE>(V::fma(V::load(weights[g] + i), V::set(factor), V::set(-now)));
            total = V::add(total, weight);
            V::store(weights[g] + i, weight);
        }
        V::store(lanes, total);
        for (float x : lanes) sum[g] += x;
        if constexpr (CODES)
            for (int i = 0; i < n; ++i) weights[g][i] *= row_scale(v + i * row, dim);
    }

    // out += weights * values, in strips of as many lanes as registers hold sums for.
    void add(const Cached *v, int n, const Cached *next) {
        constexpr int B = G <= 2 ? 4 : 2;
        for (int i = 0; i < n; ++i) ask(next, i);
        int d = 0;
        for (; d + B * L <= dim; d += B * L) strip<B>(v + d, n, d);
        for (; d < dim; d += L) strip<1>(v + d, n, d);
    }
    template <int B> void strip(const Cached *v, int n, int d) {
        T acc[G][B];
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b) acc[g][b] = V::load(out[g] + d + b * L);
        for (int i = 0; i < n; ++i, v += row) {
            T weight[G];
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) weight[g] = V::set(weights[g][i]);
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b) {
                const T value = widened(v + b * L, V());
#pragma GCC unroll 4
                for (int g = 0; g < G; ++g) acc[g][b] = V::fma(value, weight[g], acc[g][b]);
            }
        }
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b) V::store(out[g] + d + b * L, acc[g][b]);
    }

    // Unfinished sums as rows.hpp has them: a head in each of `lanes` lanes.
    void put(float *to, float *tops, float *sums, int lanes) const {
        for (int g = 0; g < G; ++g) {
            tops[g] = top[g], sums[g] = sum[g];
            for (int d = 0; d < dim; ++d) to[d * lanes + g] = out[g][d];
        }
    }
};

// Calls f with the kernel for `heads` of `dim`; false where there is none.
template <class Cached, int EXP_DEGREE, class Query, class F>
inline bool with_few_floats(int64_t heads, int dim, ptrdiff_t row, Query query, float scale, F f) {
    if (dim % Wide::L || dim > MOST_FEW_DIM) return false;
    const auto run = [&](auto g) {
        FewFloats<Cached, decltype(g)::value, EXP_DEGREE> few(query, dim, row, scale);
        f(few);
        return true;
    };
    switch (heads) {
    case 1: return run(std::integral_constant<int, 1>());
    case 2: return run(std::integral_constant<int, 2>());
    case 3: return run(std::integral_constant<int, 3>());
    case MOST_FEW_FLOATS: return run(std::integral_constant<int, 4>());
    default: return false;
    }
}
#endif

}  // namespace NATIVE_LEVEL
}  // namespace native
