// Copied from common/native/lanes.hpp by common/sync.py: change it there.
// Vectors of float lanes, one set for each instruction level, and what a dot product is made of.
//
// A kernel here keeps one row of its result in each lane (one query head, say), so sums and maxima
// over the other axis never cross lanes. The second operand of every product is broadcast from
// memory in 32-bit units: one float, or a pair of bfloat16 neighbours for the bf16 dot product.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef NATIVE_LEVEL
#define NATIVE_LEVEL scalar
#endif

// The level is part of every name: the linker would otherwise keep one copy of an inline function
// for all levels, and an old processor would meet new instructions.
namespace native {
inline namespace NATIVE_LEVEL {

using bf16 = uint16_t;

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline void from_float(float x, float *out) { *out = x; }
inline void from_float(float x, bf16 *out) {  // round to nearest even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    *out = x != x ? bf16(0x7fc0) : bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

constexpr float LOG2E = 1.44269504088896340736f, LN2 = 0.69314718055994530942f;
constexpr float LOWEST = -1e30f;  // "no maximum yet": finite, so that differences of it are numbers
// 2^f on [0, 1) by polynomials of least relative error with p(0) = 1: below 9e-5 (a twentieth of a bfloat16's rounding)
// with degree 3, 1.5e-7 in float32 with degree 5.
template <int DEGREE> struct Polynomial;
template <> struct Polynomial<3> {
    static constexpr float at[] = {1.f, 0.695116758f, 0.227644995f, 0.0770670474f};
};
template <> struct Polynomial<5> {
    static constexpr float at[] = {1.f, 0.693151295f, 0.240164444f, 0.0557999127f, 0.00901703071f, 0.00186713005f};
};

// ---- eight or sixteen lanes, without intrinsics: any processor
template <int N> struct Plain {
    static constexpr int L = N, REGISTERS = 16;
    struct T { float x[N]; };
    static T zero() { return T{}; }
    static T set(float v) { T r; for (float &x : r.x) x = v; return r; }
    static T load(const float *p) { T r; std::memcpy(r.x, p, sizeof r); return r; }
    static void store(float *p, T a) { std::memcpy(p, a.x, sizeof a); }
    static T add(T a, T b) { for (int i = 0; i < N; ++i) a.x[i] += b.x[i]; return a; }
    static T mul(T a, T b) { for (int i = 0; i < N; ++i) a.x[i] *= b.x[i]; return a; }
    static T div(T a, T b) { for (int i = 0; i < N; ++i) a.x[i] /= b.x[i]; return a; }
    // The second where either is not a number, as the instruction does.
    static T max(T a, T b) { for (int i = 0; i < N; ++i) a.x[i] = a.x[i] > b.x[i] ? a.x[i] : b.x[i]; return a; }
    static T fma(T a, T b, T c) { for (int i = 0; i < N; ++i) c.x[i] += a.x[i] * b.x[i]; return c; }
    static bool any_greater(T a, T b) { for (int i = 0; i < N; ++i) if (a.x[i] > b.x[i]) return true; return false; }
    // a where index >= bound lane by lane, else b
    static T where_reached(int index, const int32_t *bound, T a, T b) {
        for (int i = 0; i < N; ++i) if (index < bound[i]) a.x[i] = b.x[i];
        return a;
    }
    template <int DEGREE = 5> static T exp2(T a) {
        for (float &x : a.x) { const float c = -200.f > x ? -200.f : x; x = std::exp2(c); }
        return a;
    }
    static void transpose(const float *x, T *out) {  // L vectors of L lanes
        for (int i = 0; i < N; ++i) for (int j = 0; j < N; ++j) out[j].x[i] = x[i * N + j];
    }
    static void load_bf16(const bf16 *p, float *out) { for (int i = 0; i < N; ++i) out[i] = to_float(p[i]); }
};

#if defined(__AVX2__)
struct Ymm {
    static constexpr int L = 8;
#if defined(__AVX512VL__)
    static constexpr int REGISTERS = 32;
#else
    static constexpr int REGISTERS = 16;
#endif
    using T = __m256;
    static T zero() { return _mm256_setzero_ps(); }
    static T set(float v) { return _mm256_set1_ps(v); }
    static T load(const float *p) { return _mm256_loadu_ps(p); }
    static void store(float *p, T a) { _mm256_storeu_ps(p, a); }
    static T add(T a, T b) { return _mm256_add_ps(a, b); }
    static T mul(T a, T b) { return _mm256_mul_ps(a, b); }
    static T div(T a, T b) { return _mm256_div_ps(a, b); }
    static T max(T a, T b) { return _mm256_max_ps(a, b); }
    static T fma(T a, T b, T c) { return _mm256_fmadd_ps(a, b, c); }
    static bool any_greater(T a, T b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
    static T where_reached(int index, const int32_t *bound, T a, T b) {
        const __m256i below = _mm256_cmpgt_epi32(_mm256_loadu_si256((const __m256i *)bound), _mm256_set1_epi32(index));
        return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(below));
    }
#if defined(__AVX512VL__)
    template <int DEGREE = 5> static T exp2(T a) {
        const T f = _mm256_sub_ps(a, _mm256_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
        T p = set(Polynomial<DEGREE>::at[DEGREE]);
#pragma GCC unroll 6
        for (int i = DEGREE - 1; i >= 0; --i) p = fma(p, f, set(Polynomial<DEGREE>::at[i]));
        return _mm256_scalef_ps(p, a);  // by 2^floor(a)
    }
#else
    template <int DEGREE = 5> static T exp2(T a) {
        a = max(set(-126.f), a);  // below, flush to the smallest normal number, which then rounds away
        const T n = _mm256_floor_ps(a);
        const T f = _mm256_sub_ps(a, n);
        T p = set(Polynomial<DEGREE>::at[DEGREE]);
#pragma GCC unroll 6
        for (int i = DEGREE - 1; i >= 0; --i) p = fma(p, f, set(Polynomial<DEGREE>::at[i]));
        // 2^n by its exponent bits, in two halves so that n up to 128 and beyond ends at infinity.
        const T capped = _mm256_min_ps(n, set(252.f));
        const __m256i e = _mm256_cvtps_epi32(capped);
        const __m256i half = _mm256_srai_epi32(e, 1), rest = _mm256_sub_epi32(e, half);
        const __m256i bias = _mm256_set1_epi32(127);
        const T s1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
        const T s2 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
        const T value = mul(mul(p, s1), s2);
        // Exactly 0 below, and NaN stays NaN (the conversion of NaN to an integer does not).
        const T tiny = _mm256_cmp_ps(a, set(-125.5f), _CMP_LT_OQ), odd = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
        return _mm256_blendv_ps(_mm256_andnot_ps(tiny, value), a, odd);
    }
#endif
    static void transpose(const float *x, T *out) {
        T a[8], b[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) a[i] = load(x + i * 8);
#pragma GCC unroll 4
        for (int i = 0; i < 8; i += 2) b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
#pragma GCC unroll 2
        for (int i = 0; i < 8; i += 4) {
            a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44), a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
            a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44), a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            out[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
            out[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
        }
    }
    static void load_bf16(const bf16 *p, float *out) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
        _mm256_storeu_si256((__m256i *)out, _mm256_slli_epi32(wide, 16));
    }
};
#endif

#if defined(__AVX512F__)
struct Zmm {
    static constexpr int L = 16, REGISTERS = 32;
    using T = __m512;
    static T zero() { return _mm512_setzero_ps(); }
    static T set(float v) { return _mm512_set1_ps(v); }
    static T load(const float *p) { return _mm512_loadu_ps(p); }
    static void store(float *p, T a) { _mm512_storeu_ps(p, a); }
    static T add(T a, T b) { return _mm512_add_ps(a, b); }
    static T mul(T a, T b) { return _mm512_mul_ps(a, b); }
    static T div(T a, T b) { return _mm512_div_ps(a, b); }
    static T max(T a, T b) { return _mm512_max_ps(a, b); }
    static T fma(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
    static bool any_greater(T a, T b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
    static T where_reached(int index, const int32_t *bound, T a, T b) {
        const __mmask16 below = _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(bound), _mm512_set1_epi32(index));
        return _mm512_mask_blend_ps(below, a, b);
    }
    template <int DEGREE = 5> static T exp2(T a) {
        const T f = _mm512_sub_ps(a, _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
        T p = set(Polynomial<DEGREE>::at[DEGREE]);
#pragma GCC unroll 6
        for (int i = DEGREE - 1; i >= 0; --i) p = fma(p, f, set(Polynomial<DEGREE>::at[i]));
        return _mm512_scalef_ps(p, a);  // by 2^floor(a)
    }
    static void transpose(const float *x, T *out) {
        T a[16], b[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) a[i] = load(x + i * 16);
#pragma GCC unroll 8
        for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += 4) {
            a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44), a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
            a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44), a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
        }
        // a[4q + r] holds lanes r, r + 4, r + 8, r + 12 of rows 4q ... 4q + 3.
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
            b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88), b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            out[i] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88);
            out[i + 8] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd);
            out[i + 4] = _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88);
            out[i + 12] = _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd);
        }
    }
    static void load_bf16(const bf16 *p, float *out) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
        _mm512_storeu_si512(out, _mm512_slli_epi32(wide, 16));
    }
};
#endif

// ---- products: acc + a · broadcast(unit). `Unit` is what is broadcast.
template <class V> struct FloatDot {
    using Unit = float;
    static typename V::T dot(typename V::T acc, const float *a, const Unit *b) {
        return V::fma(V::load(a), V::set(*b), acc);
    }
    static typename V::T dot(typename V::T acc, typename V::T a, const Unit *b) { return V::fma(a, V::set(*b), acc); }
};

#if defined(__AVX512BF16__)
// A unit is two bfloat16; a lane holds two of its row. Products are exact, sums in fp32.
template <class V> struct PairDot;
template <> struct PairDot<Zmm> {
    using Unit = uint32_t;
    static __m512 dot(__m512 acc, __m512 a, const Unit *b) {
        return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)_mm512_set1_epi32(int32_t(*b)));
    }
    // Lane by lane: even in the low half, odd in the high half, rounded.
    static void pack(const float *even, const float *odd, float *out) {
        const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(odd), _mm512_loadu_ps(even));
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                               23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, (__m512i)both));
    }
    // L floats to L bfloat16, in order.
    static void narrow(const float *x, uint32_t *out) {
        _mm256_storeu_si256((__m256i *)out, (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x)));
    }
};
template <> struct PairDot<Ymm> {
    using Unit = uint32_t;
    static __m256 dot(__m256 acc, __m256 a, const Unit *b) {
        return _mm256_dpbf16_ps(acc, (__m256bh)a, (__m256bh)_mm256_set1_epi32(int32_t(*b)));
    }
    static void pack(const float *even, const float *odd, float *out) {
        const __m256bh both = _mm256_cvtne2ps_pbh(_mm256_loadu_ps(odd), _mm256_loadu_ps(even));
        const __m256i order = _mm256_set_epi16(15, 7, 14, 6, 13, 5, 12, 4, 11, 3, 10, 2, 9, 1, 8, 0);
        _mm256_storeu_si256((__m256i *)out, _mm256_permutexvar_epi16(order, (__m256i)both));
    }
    static void narrow(const float *x, uint32_t *out) {
        _mm_storeu_si128((__m128i *)out, (__m128i)_mm256_cvtneps_pbh(_mm256_loadu_ps(x)));
    }
};
#endif

}  // namespace NATIVE_LEVEL
}  // namespace native
