// Matrix-vector product of 2bit weights: the four digits of a byte are four planes of a vector, each multiplied where it is.
#pragma once
#include "layout.hpp"
#include "vectors.hpp"

namespace bitcpm {
inline namespace NATIVE_LEVEL {

// int32 sums of the products d x of n columns, added to sum[v]: one block of 64 rows. Not inlined: GCC would keep the
// caller's sums in registers that the loop needs.
__attribute__((noinline)) inline void multiply_planes(const char *codes, const int8_t *x, int64_t n, I *sum) {
    const I mask = set(0x03030303);
#if BITCPM_VNNI
    // Plane l is left at 4^l times its value, in sums of its own, and these are shifted down in the end.
    const I mask1 = set(0x0c0c0c0c), mask2 = set(0x30303030), mask3 = set(int32_t(0xc0c0c0c0));
    struct Sums {
        I plane0 = zero(), plane1 = zero(), plane2 = zero(), plane3 = zero();
        I total() const { return add(add(plane0, shift_signed<2>(plane1)), add(shift_signed<4>(plane2), shift_signed<6>(plane3))); }
    } a, b, c, d;
    for (int64_t i = 0; i < n; i += 16, codes += 256, x += 16) {
        const I x0 = broadcast(x), x1 = broadcast(x + 4), x2 = broadcast(x + 8), x3 = broadcast(x + 12);
        const auto step = [&](const char *p, Sums &s) {
            __builtin_prefetch(p + FAR_AHEAD);
            const I w = load(p);
            s.plane0 = dot(s.plane0, both(w, mask), x0), s.plane1 = dot(s.plane1, both(w, mask1), x1);
            s.plane2 = dot(s.plane2, both(w, mask2), x2), s.plane3 = dot(s.plane3, both(w, mask3), x3);
        };
        step(codes, a), step(codes + 64, b), step(codes + 128, c), step(codes + 192, d);
    }
    sum[0] = add(sum[0], a.total()), sum[1] = add(sum[1], b.total());
    sum[2] = add(sum[2], c.total()), sum[3] = add(sum[3], d.total());
#else
    for (int v = 0; v < 4; v += 2)
        for (int64_t c = 0; c < n;) {
            I some[2] = {begin_words(sum[v]), begin_words(sum[v + 1])};
            for (const int64_t stop = smaller(n, c + WORD_COLUMNS); c < stop; c += 16) {
                const I x0 = broadcast(x + c), x1 = broadcast(x + c + 4), x2 = broadcast(x + c + 8), x3 = broadcast(x + c + 12);
#pragma GCC unroll 2
                for (int j = 0; j < 2; ++j) {
                    const char *p = codes + 16 * c + 64 * (v + j);
                    __builtin_prefetch(p + FAR_AHEAD);
                    const I w = load(p);
                    some[j] = dot_words(some[j], both(w, mask), x0);
                    some[j] = dot_words(some[j], both(shift_right<2>(w), mask), x1);
                    some[j] = dot_words(some[j], both(shift_right<4>(w), mask), x2);
                    some[j] = dot_words(some[j], both(shift_right<6>(w), mask), x3);
                }
            }
            sum[v] = end_words(sum[v], some[0]), sum[v + 1] = end_words(sum[v + 1], some[1]);
        }
#endif
}

}  // namespace NATIVE_LEVEL
}  // namespace bitcpm
