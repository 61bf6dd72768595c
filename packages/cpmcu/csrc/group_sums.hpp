// Sums of products of a group's weights, unsigned bytes, with activations, signed ones, on processors with sixteen
// registers and no dot product of bytes.
//
// The instruction that multiplies unsigned bytes with signed ones adds two products in 16 bits. Weights below 16 leave
// room there for 32 columns: 16 products of at most 15 * 128. Eight bits do not, and go as words.
#pragma once
#include "panel.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

enum Weights { BYTES, SMALL_BYTES, NIBBLES };  // small: below 16. Nibbles: two columns in a byte, as int4 is stored

#if defined(__AVX2__) && !defined(__AVX512F__)
struct GroupSums {
    using I = Panel::I;
    static I products(I w, I four) { return {_mm256_maddubs_epi16(w.a, four.a), _mm256_maddubs_epi16(w.b, four.b)}; }
    static I add_words(I x, I y) { return kept({_mm256_add_epi16(x.a, y.a), _mm256_add_epi16(x.b, y.b)}); }
    // Sums stay what they are, in their registers: GCC would add in another order, for which it makes all products first.
    static I kept(I x) {
        __asm__("" : "+x"(x.a), "+x"(x.b));
        return x;
    }
    static I add_bytes(I x, I y) { return {_mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)}; }
    static I even(I w) {
        const __m256i lower = _mm256_set1_epi16(255);
        return {_mm256_and_si256(w.a, lower), _mm256_and_si256(w.b, lower)};
    }
    static I odd(I w) { return {_mm256_srli_epi16(w.a, 8), _mm256_srli_epi16(w.b, 8)}; }
    // sum + the two words of each lane of x times those of y
    static I widen(I sum, I x, I y = {_mm256_set1_epi16(1), _mm256_set1_epi16(1)}) { return kept(Panel::product(sum, x, y)); }

    // 32 columns of N tokens, W apart, of bytes below 16.
    template <int N, int W> static void small(const uint8_t *w, const int8_t *a, I *acc) {
        I part[N];
#pragma GCC unroll 4
        for (int t = 0; t < N; ++t) part[t] = Panel::none();
        for (int k = 0; k < 32; k += 4, w += 64, a += W * 4) {
            const I bytes = Panel::bytes(w);
#pragma GCC unroll 4
            for (int t = 0; t < N; ++t) part[t] = add_words(part[t], products(bytes, Panel::unit(a + t * 4)));
        }
#pragma GCC unroll 4
        for (int t = 0; t < N; ++t) acc[t] = widen(acc[t], part[t]);
    }

    // 32 columns of one token of nibbles, and their sums.
    static void nibbles(const uint8_t *w, const int8_t *a, ptrdiff_t ahead, I *acc, I *sum) {
        I part[2] = {Panel::none(), Panel::none()}, weights = Panel::none();
        for (int k = 0; k < 32; k += 8, w += 64, a += 8) {
            __builtin_prefetch(w + ahead);
            const I bytes = Panel::bytes(w), low = Panel::low(bytes), high = Panel::high(bytes);
            part[0] = add_words(part[0], products(low, Panel::unit(a)));
            part[1] = add_words(part[1], products(high, Panel::unit(a + 4)));
            weights = add_bytes(weights, add_bytes(low, high));
        }
        *acc = widen(*acc, add_words(part[0], part[1]));
        *sum = widen(*sum, products(weights, Panel::ones()));
    }

    // Any bytes, `count` columns; for a single token their sums too.
    template <int N, int W> static void bytes(const uint8_t *w, const int8_t *a, int count, ptrdiff_t ahead, I *acc, I *sum) {
        I weights = Panel::none();  // at most 2 * 255 * 128 / 4
        for (int k = 0; k < count; k += 4, w += 64, a += W * 4) {
            if (N == 1) __builtin_prefetch(w + ahead);
            const I bytes = Panel::bytes(w), first = even(bytes), second = odd(bytes);
            if (N == 1) weights = add_words(weights, add_words(first, second));
#pragma GCC unroll 4
            for (int t = 0; t < N; ++t) {
                int32_t unit;
                std::memcpy(&unit, a + t * 4, 4);
                const __m256i four = _mm256_set1_epi32(unit);
                const __m256i x = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8), y = _mm256_srai_epi16(four, 8);
                acc[t] = widen(widen(acc[t], first, {x, x}), second, {y, y});
            }
        }
        if (N == 1) *sum = widen(*sum, weights);
    }
};
#endif

}  // namespace NATIVE_LEVEL
}  // namespace native
