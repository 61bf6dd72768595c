// Copied from common/native/broadcast_gemm.hpp by common/sync.py: change it there.
// C[n][lane] (+)= sum over k of A[k][lane] · B(n, k), with B broadcast from memory unit by unit.
//
// G lane groups side by side share each broadcast. No sum crosses lanes, and every element of C is
// summed over k in order whatever n, G or the width of a vector: equal rows give equal bits.
#pragma once
#include "lanes.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

// N columns at once, all in registers. STRIDE: distance of columns in B if it is known, else 0. `next` is memory
// that will be read soon, or null: a cache line is asked for at each step (all at once would stall).
template <class V, class Dot, int G, int N, int STRIDE, bool AHEAD>
inline void columns(const typename Dot::Unit *b, ptrdiff_t bn, ptrdiff_t bk, const float *a, ptrdiff_t a_group,
                    int depth, float *c, ptrdiff_t c_group, ptrdiff_t c_column, bool accumulate,
                    const char *next) {
    constexpr int L = V::L;
    const ptrdiff_t stride = STRIDE ? STRIDE : bn;
    typename V::T acc[N][G];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g) acc[n][g] = accumulate ? V::load(c + g * c_group + n * c_column) : V::zero();
    for (int k = 0; k < depth; ++k) {
        typename V::T row[G];
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g) row[g] = V::load(a + g * a_group + k * L);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
            for (int g = 0; g < G; ++g) acc[n][g] = Dot::dot(acc[n][g], row[g], b + n * stride);
        b += bk;
        if (AHEAD) __builtin_prefetch(next + k * 64, 0, 2);
    }
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g) V::store(c + g * c_group + n * c_column, acc[n][g]);
}

template <class V, class Dot, int G, int STRIDE, bool AHEAD>
inline void all_columns(const typename Dot::Unit *b, ptrdiff_t bn, ptrdiff_t bk, const float *a, ptrdiff_t a_group,
                        int depth, int count, float *c, ptrdiff_t c_group, ptrdiff_t c_column, bool accumulate,
                        const char *next) {
    constexpr int WIDE = V::REGISTERS == 32 ? 16 / G : 8 / G;
    int n = 0;
    for (; n + WIDE <= count; n += WIDE, next += AHEAD ? depth * 64 : 0)
        columns<V, Dot, G, WIDE, STRIDE, AHEAD>(b + n * bn, bn, bk, a, a_group, depth, c + n * c_column, c_group, c_column, accumulate, next);
    for (; n + 4 <= count; n += 4)
        columns<V, Dot, G, 4, STRIDE, false>(b + n * bn, bn, bk, a, a_group, depth, c + n * c_column, c_group, c_column, accumulate, next);
    for (; n < count; ++n)
        columns<V, Dot, G, 1, STRIDE, false>(b + n * bn, bn, bk, a, a_group, depth, c + n * c_column, c_group, c_column, accumulate, next);
}

// All `count` columns. A is [group][depth][L], C is [group][count][L] unless its columns are `c_column` apart, in
// floats (a unit in A is a lane's float, or its pair of bfloat16 in 32 bits). With 16 columns at a time `next` covers
// as many bytes as B has.
template <class V, class Dot, int G, int STRIDE = 0>
inline void broadcast_gemm(const typename Dot::Unit *b, ptrdiff_t bn, ptrdiff_t bk, const float *a, ptrdiff_t a_group,
                           int depth, int count, float *c, ptrdiff_t c_group, bool accumulate, const char *next = nullptr,
                           ptrdiff_t c_column = V::L) {
    if (next)
        all_columns<V, Dot, G, STRIDE, true>(b, bn, bk, a, a_group, depth, count, c, c_group, c_column, accumulate, next);
    else
        all_columns<V, Dot, G, STRIDE, false>(b, bn, bk, a, a_group, depth, count, c, c_group, c_column, accumulate, next);
}

}  // namespace NATIVE_LEVEL
}  // namespace native
