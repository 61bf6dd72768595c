// Copied from common/native/few_int8.hpp by common/sync.py: change it there.
// One token's attention over a cache in eight bits, where few query heads share their keys: as few_heads.hpp, but keys
// and values are multiplied as they lie, without widening them first.
//
// The products of unsigned and signed bytes want the other side in bytes too. Queries and weights keep sixteen bits, as
// two bytes each: sum x (256 high + low) is two byte products, exact in 32 bits. Needs VNNI and a head size of 64 or 128.
#pragma once
#include "few_heads.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
constexpr float MOST_WORD = 127 * 256;  // both of its bytes are signed ones

// 16 words, |x| <= MOST_WORD, as high and low signed bytes.
inline void split_words(__m512i words, int8_t *high, int8_t *low) {
    const __m512i l = _mm512_srai_epi32(_mm512_slli_epi32(words, 24), 24);
    _mm_storeu_si128((__m128i *)low, _mm512_cvtepi32_epi8(l));
    _mm_storeu_si128((__m128i *)high, _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_sub_epi32(words, l), 8)));
}

inline __m512i byte_dot(__m512i acc, __m512i unsigned_bytes, __m512i signed_bytes) {
    // Not the intrinsic: GCC copies the accumulator before each one.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(unsigned_bytes), "v"(signed_bytes));
    return acc;
}

// Four bytes of memory in every lane.
inline __m512i byte_dot(__m512i acc, __m512i unsigned_bytes, const int8_t *four) {
    typedef int32_t __attribute__((may_alias)) word;
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(unsigned_bytes), "m"(*reinterpret_cast<const word *>(four)));
    return acc;
}

// Lane i of x[j] and lane j of x[i] change places.
inline void transpose(__m512i *x) {
    __m512i a[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) a[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]), a[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]), x[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]), x[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512i even = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88), odd = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xdd);
        const __m512i even2 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88), odd2 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xdd);
        x[c] = _mm512_shuffle_i32x4(even, even2, 0x88), x[8 + c] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        x[4 + c] = _mm512_shuffle_i32x4(odd, odd2, 0x88), x[12 + c] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
}

// G heads of head size 64 E.
template <int G, int E> struct FewInt8 {
    static constexpr int DIM = 64 * E;
    alignas(64) int8_t q_high[G][DIM], q_low[G][DIM];
    int32_t q_sum[G];  // 128 of these are too much in every score: keys are made unsigned
    __m512 sum[G];
    float top[G], q_scale[G];
    alignas(64) float out[G][DIM];
    alignas(64) int8_t high[G][TILE], low[G][TILE];  // weights
    float weight_scale[G];
    int32_t weight_sum[G];
    alignas(64) float value_scales[TILE];

    template <class Query> FewInt8(Query query, float scale) {
        for (int g = 0; g < G; ++g) {
            float most = 0.f;
            alignas(64) float x[DIM];
            for (int d = 0; d < DIM; ++d) {
                x[d] = to_float(query(g)[d]);
                const float size = std::fabs(x[d]);
                most = size <= most ? most : size;  // NaN too: the results tell
            }
            const __m512 inverse = _mm512_set1_ps(most > 0.f ? MOST_WORD / most : 0.f);
            __m512i total = _mm512_setzero_si512();
            for (int d = 0; d < DIM; d += 16) {
                const __m512i words = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(x + d), inverse));
                total = _mm512_add_epi32(total, words);
                split_words(words, q_high[g] + d, q_low[g] + d);
            }
            q_sum[g] = _mm512_reduce_add_epi32(total), q_scale[g] = scale * (most / MOST_WORD);
            sum[g] = _mm512_setzero_ps(), top[g] = LOWEST;
            for (float &y : out[g]) y = 0.f;
        }
    }

    // n keys and values, rows lie `row` bytes from each other; those of the next tile are asked for meanwhile.
    void visit(const int8_t *k, const int8_t *v, ptrdiff_t row, int n, const char *next_keys, const char *next_values) {
        Ask ask_keys(next_keys, row, TILE), ask_values(next_values, row, TILE / 2);
        __m512 scores[G][TILE / 16];
        for (int p = 0; p < TILE / 16; ++p) score(k, row, n, 16 * p, ask_keys, scores, p);
        for (int i = 0; i < TILE; ++i) value_scales[i] = i < n ? row_scale(v + i * row, DIM) : 0.f;
        for (int g = 0; g < G; ++g) weigh(g, scores[g]);
        add(v, row, n, ask_values);
    }

    // Scores of sixteen keys, those beyond n -inf: a key in each lane.
    void score(const int8_t *k, ptrdiff_t row, int n, int first, Ask &ask, __m512 (*scores)[TILE / 16], int p) {
        const __m512i sign = _mm512_set1_epi8(-128);
        __m512i large[G], small[G];
        alignas(64) float scales[16];
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) large[g] = small[g] = _mm512_setzero_si512();
        for (int e = 0; e < E; ++e) {
            __m512i x[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                const int8_t *from = k + (first + i < n ? first + i : n - 1) * row;
                x[i] = _mm512_loadu_si512(from + 64 * e);
                if (e == 0) scales[i] = row_scale(from, DIM), ask.step();
            }
            transpose(x);
#pragma GCC unroll 16
            for (int j = 0; j < 16; ++j) {
                const __m512i four = _mm512_xor_si512(x[j], sign);
#pragma GCC unroll 4
                for (int g = 0; g < G; ++g) {
                    large[g] = byte_dot(large[g], four, q_high[g] + 64 * e + 4 * j);
                    small[g] = byte_dot(small[g], four, q_low[g] + 64 * e + 4 * j);
                }
            }
        }
        const int here = n - first;
        const __mmask16 real = here >= 16 ? __mmask16(-1) : here > 0 ? __mmask16((1u << here) - 1) : __mmask16(0);
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
            const __m512i all = _mm512_add_epi32(_mm512_slli_epi32(large[g], 8), small[g]);
            const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(all, _mm512_set1_epi32(128 * q_sum[g])));
            const __m512 s = _mm512_mul_ps(exact, _mm512_mul_ps(_mm512_load_ps(scales), _mm512_set1_ps(q_scale[g])));
            scores[g][p] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), real, s);
        }
    }

    // Weights of the tile's keys for head g.
    void weigh(int g, const __m512 *score) {
        using V = Zmm;
        __m512 best = score[0];
        for (int p = 1; p < TILE / 16; ++p) best = V::max(score[p], best);
        const float most = _mm512_reduce_max_ps(best), now = most > top[g] ? most : top[g];
        if (now > top[g]) {
            float shrinks[16];
            V::store(shrinks, V::exp2(V::set(top[g] - now)));
            const __m512 shrink = V::set(shrinks[0]);
            sum[g] = V::mul(sum[g], shrink);
            for (int d = 0; d < DIM; d += 16) V::store(out[g] + d, V::mul(V::load(out[g] + d), shrink));
            top[g] = now;
        }
        __m512 weight[TILE / 16], largest = V::zero(), total = V::zero();
        for (int p = 0; p < TILE / 16; ++p) {
            const __m512 w = V::exp2(V::add(score[p], V::set(-now)));
            sum[g] = V::add(sum[g], w);
            weight[p] = V::mul(w, V::load(value_scales + 16 * p));
            largest = V::max(weight[p], largest), total = V::add(total, weight[p]);
        }
        const float tallest = _mm512_reduce_max_ps(largest);
        const bool odd = !(_mm512_reduce_add_ps(total) < INFINITY);
        const __m512 inverse = V::set(tallest > 0.f && !odd ? MOST_WORD / tallest : 0.f);
        __m512i words = _mm512_setzero_si512();
        for (int p = 0; p < TILE / 16; ++p) {
            const __m512i w = _mm512_cvtps_epi32(V::mul(weight[p], inverse));
            words = _mm512_add_epi32(words, w);
            split_words(w, high[g] + 16 * p, low[g] + 16 * p);
        }
        weight_sum[g] = _mm512_reduce_add_epi32(words), weight_scale[g] = odd ? NAN : tallest / MOST_WORD;
    }

    // out += weights * values, four keys at a time, half of each 16 numbers after the other.
    void add(const int8_t *v, ptrdiff_t row, int n, Ask &ask) {
        for (int e = 0; e < E; ++e) half<false>(v + 64 * e, row, n, 64 * e, ask), half<true>(v + 64 * e, row, n, 64 * e + 32, ask);
    }

    template <bool UPPER> void half(const int8_t *v, ptrdiff_t row, int n, int to, Ask &ask) {
        const __m512i sign = _mm512_set1_epi8(-128);
        __m512i large[G][2], small[G][2];
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) large[g][0] = large[g][1] = small[g][0] = small[g][1] = _mm512_setzero_si512();
        for (int i = 0; i < n; i += 4) {
            const auto at = [&](int j) { return _mm512_loadu_si512(v + (i + j < n ? i + j : n - 1) * row); };  // weight 0
            const auto pair = [](__m512i x, __m512i y) { return UPPER ? _mm512_unpackhi_epi8(x, y) : _mm512_unpacklo_epi8(x, y); };
            const __m512i a = pair(at(0), at(1)), b = pair(at(2), at(3));
            const __m512i first = _mm512_xor_si512(_mm512_unpacklo_epi16(a, b), sign), last = _mm512_xor_si512(_mm512_unpackhi_epi16(a, b), sign);
            ask.step();
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) {
                int32_t four[2];
                std::memcpy(four, high[g] + i, 4), std::memcpy(four + 1, low[g] + i, 4);
                const __m512i h = _mm512_set1_epi32(four[0]), l = _mm512_set1_epi32(four[1]);
                large[g][0] = byte_dot(large[g][0], first, h), large[g][1] = byte_dot(large[g][1], last, h);
                small[g][0] = byte_dot(small[g][0], first, l), small[g][1] = byte_dot(small[g][1], last, l);
            }
        }
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g)
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                const __m512i all = _mm512_add_epi32(_mm512_slli_epi32(large[g][j], 8), small[g][j]);
                const __m512 real = _mm512_cvtepi32_ps(_mm512_sub_epi32(all, _mm512_set1_epi32(128 * weight_sum[g])));
                float *y = out[g] + to + 16 * j;
                _mm512_store_ps(y, _mm512_fmadd_ps(real, _mm512_set1_ps(weight_scale[g]), _mm512_load_ps(y)));
            }
    }

    // Unfinished sums as rows.hpp has them: a head in each of L lanes.
    void put(float *to, float *tops, float *sums, int L) const {
        for (int g = 0; g < G; ++g) {
            tops[g] = top[g], sums[g] = _mm512_reduce_add_ps(sum[g]);
            for (int d = 0; d < DIM; ++d) to[d * L + g] = out[g][position(d)];
        }
    }
    // Where number d is: interleaving takes four from each 128 bits, in the order of its bits 3 and 2.
    static int position(int d) { return (d & ~63) | (d >> 3 & 1) << 5 | (d >> 2 & 1) << 4 | (d >> 4 & 3) << 2 | (d & 3); }
};

// Calls f with the kernel for `heads` of `dim`; false where there is none.
template <class Query, class F> inline bool with_few_int8(int64_t heads, int dim, Query query, float scale, F f) {
    const auto run = [&](auto g, auto e) {
        FewInt8<decltype(g)::value, decltype(e)::value> few(query, scale);
        f(few);
        return true;
    };
    using One = std::integral_constant<int, 1>;
    using Two = std::integral_constant<int, 2>;
    const auto sized = [&](auto g) { return dim == 64 ? run(g, One()) : dim == 128 ? run(g, Two()) : false; };
    return heads == 1 ? sized(One()) : heads == 2 ? sized(Two()) : heads == 3 ? sized(std::integral_constant<int, 3>()) : heads == 4 ? sized(std::integral_constant<int, 4>()) : false;
}
#endif

}  // namespace NATIVE_LEVEL
}  // namespace native
