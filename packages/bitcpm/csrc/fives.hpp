// Matrix-vector product of 1.6bit weights on AVX2: bytes become five digits in registers, and two columns of sixteen rows
// are multiplied at a time. With byte permutations there are tables (tables.hpp); with more tokens digits wait in memory.
#pragma once
#include "unpack.hpp"

namespace bitcpm {
inline namespace NATIVE_LEVEL {

#if defined(__AVX2__) && !defined(__AVX512F__)
#define BITCPM_FIVES 1
// int32 sums of the products d x of n columns, added to sum[v]: one block of a strip of `blocks`. Not inlined: GCC would
// keep the caller's sums in registers that the loop needs.
__attribute__((noinline)) inline void multiply_fives(const char *codes, int64_t blocks, const int8_t *x, int64_t n, I *sum) {
    constexpr int64_t MOST = 24;  // chunks: 16 bits hold 120 products of at most 2 * 127
    const Digits take;
    const int64_t chunks = div_up(n, 5), step = 64 * blocks;
    for (int64_t c = 0; c < chunks;) {
        Bytes low[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()}, high[2] = {low[0], low[0]};
        for (const int64_t stop = smaller(chunks, c + MOST); c < stop; c += 2) {
            const char *first = codes + step * c, *second = c + 1 < chunks ? first + step : first;
            const int8_t *at = x + 5 * c;
            int8_t last[10] = {};  // what is beyond n is multiplied by zero
            if (5 * (c + 2) > n) std::memcpy(last, at, size_t(n - 5 * c)), at = last;
            Bytes two[5];
#pragma GCC unroll 5
            for (int i = 0; i < 5; ++i) {
                int16_t both;
                std::memcpy(&both, at + 2 * i, 2);
                two[i] = _mm256_set1_epi16(both);
            }
            __builtin_prefetch(first + FAR_AHEAD), __builtin_prefetch(second + FAR_AHEAD);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                Bytes d[10];
                take.of(first + 32 * half, d), take.of(second + 32 * half, d + 5);
#pragma GCC unroll 5
                for (int i = 0; i < 5; ++i) {
                    low[half] = _mm256_add_epi16(low[half], _mm256_maddubs_epi16(low8(d[2 * i], d[2 * i + 1]), two[i]));
                    high[half] = _mm256_add_epi16(high[half], _mm256_maddubs_epi16(high8(d[2 * i], d[2 * i + 1]), two[i]));
                }
            }
        }
        // A byte 16 b + 4 a + c of 64 is of row 16 a + 4 b + c: interleaved halves hold four rows of two a for each b.
        const auto narrow = [](Bytes words) { return _mm256_unpacklo_epi16(words, _mm256_srai_epi16(words, 15)); };
        const auto wide = [](Bytes words) { return _mm256_unpackhi_epi16(words, _mm256_srai_epi16(words, 15)); };
        sum[0] = add(sum[0], {narrow(low[0]), narrow(low[1])}), sum[1] = add(sum[1], {wide(low[0]), wide(low[1])});
        sum[2] = add(sum[2], {narrow(high[0]), narrow(high[1])}), sum[3] = add(sum[3], {wide(high[0]), wide(high[1])});
    }
}
#else
#define BITCPM_FIVES 0
#endif

}  // namespace NATIVE_LEVEL
}  // namespace bitcpm
