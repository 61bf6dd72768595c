// Copied from common/native/broadcast_gemm.hpp by common/sync.py: change it there.
// C[n][lane] (+)= sum over k of A[k][lane] · B(n, k), with B broadcast from memory unit by unit.
//
// G lane groups side by side share each broadcast. No sum crosses lanes, and every element of C is
// summed over k in order whatever n, G or the width of a vector: equal rows give equal bits.
#pragma once
#include "lanes.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

// What is done besides, a little at each step, on ports that the products leave free: nothing, or asking for cache
// lines that will be read soon (all at once would stall). Others offer the same call: step k of `depth` of the columns
// [n, n + N). They keep no state, which would be carried from step to step through memory.
struct Nothing {
    template <int N> void step(int, int, int) const {}
};
struct Fetch {
    const char *next;
    template <int N> void step(int n, int k, int depth) const { __builtin_prefetch(next + (n / N * depth + k) * 64, 0, 2); }
};

// N columns at once, all in registers. STRIDE: distance of columns in B if it is known, else 0.
template <class V, class Dot, int G, int N, int STRIDE, class Aside>
inline void columns(const typename Dot::Unit *b, ptrdiff_t bn, ptrdiff_t bk, const float *a, ptrdiff_t a_group,
                    int depth, float *c, ptrdiff_t c_group, ptrdiff_t c_column, bool accumulate, int first, const Aside &aside) {
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
        aside.template step<N>(first, k, depth);
    }
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g) V::store(c + g * c_group + n * c_column, acc[n][g]);
}

template <class V, int G> constexpr int columns_at_once() { return V::REGISTERS == 32 ? 16 / G : 8 / G; }

// All `count` columns. A is [group][depth][L], C is [group][count][L] unless its columns are `c_column` apart, in
// floats (a unit in A is a lane's float, or its pair of bfloat16 in 32 bits). `aside` has its turn at each step of as
// many columns as go at once; those left over go without.
template <class V, class Dot, int G, int STRIDE = 0, class Aside = Nothing>
inline void broadcast_gemm(const typename Dot::Unit *b, ptrdiff_t bn, ptrdiff_t bk, const float *a, ptrdiff_t a_group,
                           int depth, int count, float *c, ptrdiff_t c_group, bool accumulate, const Aside &aside = Aside(),
                           ptrdiff_t c_column = V::L) {
    constexpr int WIDE = columns_at_once<V, G>();
    int n = 0;
    for (; n + WIDE <= count; n += WIDE)
        columns<V, Dot, G, WIDE, STRIDE>(b + n * bn, bn, bk, a, a_group, depth, c + n * c_column, c_group, c_column, accumulate, n, aside);
    for (; n + 4 <= count; n += 4)
        columns<V, Dot, G, 4, STRIDE>(b + n * bn, bn, bk, a, a_group, depth, c + n * c_column, c_group, c_column, accumulate, n, Nothing());
    for (; n < count; ++n)
        columns<V, Dot, G, 1, STRIDE>(b + n * bn, bn, bk, a, a_group, depth, c + n * c_column, c_group, c_column, accumulate, n, Nothing());
}

}  // namespace NATIVE_LEVEL
}  // namespace native
