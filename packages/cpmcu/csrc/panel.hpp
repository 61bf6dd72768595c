// Sixteen rows at a time: vectors of sixteen 32-bit lanes, as one register, two, or plain arrays, and the dot products
// of each layout of weights. A lane is a row; what it is multiplied by is broadcast.
#pragma once
#include "lanes.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

constexpr int ROWS = 16, TOKENS = 12;  // of a panel, and of a block

inline float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
    uint32_t bits;
    if (exponent == 0) {
        const float value = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24
        std::memcpy(&bits, &value, 4);
    } else {
        bits = exponent == 31 ? 0x7f800000u | mantissa << 13 : (exponent + 112) << 23 | mantissa << 13;
    }
    bits |= sign;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t float_to_half(float x) {  // to nearest even; too large becomes infinity
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x47800000) return uint16_t(sign | 0x7c00);
    if (magnitude < 0x38800000) {  // subnormal: the sum rounds for us
        float a;
        std::memcpy(&a, &magnitude, 4);
        a += 0.5f;
        uint32_t sum;
        std::memcpy(&sum, &a, 4);
        return uint16_t(sign | (sum - 0x3f000000));
    }
    return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

#if defined(__AVX512F__)
struct Panel {
    using F = __m512;
    using I = __m512i;
    static F zero() { return _mm512_setzero_ps(); }
    static F load(const float *p) { return _mm512_loadu_ps(p); }
    static void store(float *p, F a) { _mm512_storeu_ps(p, a); }
    static F set(float v) { return _mm512_set1_ps(v); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F abs(F a) { return _mm512_abs_ps(a); }
    static float most(F a) { return _mm512_reduce_max_ps(a); }
    static float sum(F a) { return _mm512_reduce_add_ps(a); }
    static int32_t sum(I a) { return _mm512_reduce_add_epi32(a); }
    static bool any_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
    static I round(F a) { return _mm512_cvtps_epi32(a); }
    static void store_bytes(int8_t *p, I a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(a)); }
    static F halves(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
    static I none() { return _mm512_setzero_si512(); }
    static I ones() { return _mm512_set1_epi8(1); }
    static I add(I a, I b) { return _mm512_add_epi32(a, b); }
    static void store_words(int32_t *p, I a) { _mm512_storeu_si512(p, a); }
    static I bytes(const void *p) { return _mm512_loadu_si512(p); }
    static I unit(const void *p) {
        int32_t x;
        std::memcpy(&x, p, 4);
        return _mm512_set1_epi32(x);
    }
    static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
    static I low(I a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
    static I high(I a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
    // acc + a * b, of lanes that fit into 16 bits; a is not negative
    static I product(I acc, I a, I b) {
#if defined(__AVX512VNNI__)
        return _mm512_dpwssd_epi32(acc, a, b);
#else
        return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b));
#endif
    }
    // acc + four unsigned bytes of each lane times four signed ones
    static I dot(I acc, I w, I a) {
#if defined(__AVX512VNNI__)
        return _mm512_dpbusd_epi32(acc, w, a);
#else
        const I ones = _mm512_set1_epi32(0x00ff00ff);
        const I even = _mm512_madd_epi16(_mm512_and_si512(w, ones), _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8));
        const I odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(a, 8));
        return _mm512_add_epi32(acc, _mm512_add_epi32(even, odd));
#endif
    }
    static F pairs(F acc, I w, I a) {
#if defined(__AVX512BF16__)
        return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)a);
#else
        const I upper = _mm512_set1_epi32(int32_t(0xffff0000));
        acc = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), acc);
        return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(w, upper)), _mm512_castsi512_ps(_mm512_and_si512(a, upper)), acc);
#endif
    }
};
#elif defined(__AVX2__)
struct Panel {
    struct F { __m256 a, b; };
    struct I { __m256i a, b; };
    static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static F load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store(float *p, F x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
    static F set(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
    static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
    static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
    static F abs(F x) {
        const __m256 sign = _mm256_set1_ps(-0.f);
        return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
    }
    static float most(F x) {
        const __m256 eight = _mm256_max_ps(x.a, x.b);
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }
    static float sum(F x) {
        const __m256 eight = _mm256_add_ps(x.a, x.b);
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    static int32_t sum(I x) {
        const __m256i eight = _mm256_add_epi32(x.a, x.b);
        const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
        const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
    }
    static bool any_nan(F x) {
        return _mm256_movemask_ps(_mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q)) | _mm256_movemask_ps(_mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q));
    }
    static I round(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
    static void store_bytes(int8_t *p, I x) {  // of lanes that fit
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
        _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
    }
    static F halves(const uint16_t *p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
    }
    static I none() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static I ones() { return {_mm256_set1_epi8(1), _mm256_set1_epi8(1)}; }
    static I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
    static void store_words(int32_t *p, I x) { std::memcpy(p, &x, sizeof x); }
    static I product(I acc, I x, I y) { return add(acc, {_mm256_madd_epi16(x.a, y.a), _mm256_madd_epi16(x.b, y.b)}); }
    static I bytes(const void *p) { return {_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1)}; }
    static I unit(const void *p) {
        int32_t x;
        std::memcpy(&x, p, 4);
        return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
    }
    static F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
    static I low(I x) {
        const __m256i m = _mm256_set1_epi8(15);
        return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
    }
    static I high(I x) { return low({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
    static __m256i dot_half(__m256i acc, __m256i w, __m256i a) {
        const __m256i even = _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi32(0x00ff00ff)), _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
        const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w, 8), _mm256_srai_epi16(a, 8));
        return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
    }
    static I dot(I acc, I w, I a) { return {dot_half(acc.a, w.a, a.a), dot_half(acc.b, w.b, a.b)}; }
    static __m256 pair_half(__m256 acc, __m256i w, __m256i a) {
        const __m256i upper = _mm256_set1_epi32(int32_t(0xffff0000));
        acc = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), acc);
        return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(w, upper)), _mm256_castsi256_ps(_mm256_and_si256(a, upper)), acc);
    }
    static F pairs(F acc, I w, I a) { return {pair_half(acc.a, w.a, a.a), pair_half(acc.b, w.b, a.b)}; }
};
#else
struct Panel {
    struct F { float x[ROWS]; };
    struct I { int32_t x[ROWS]; };
    static F zero() { return F{}; }
    static F load(const float *p) { F r; std::memcpy(r.x, p, sizeof r); return r; }
    static void store(float *p, F a) { std::memcpy(p, a.x, sizeof a); }
    static F set(float v) { F r; for (float &x : r.x) x = v; return r; }
    static F fma(F a, F b, F c) { for (int i = 0; i < ROWS; ++i) c.x[i] += a.x[i] * b.x[i]; return c; }
    static F mul(F a, F b) { for (int i = 0; i < ROWS; ++i) a.x[i] *= b.x[i]; return a; }
    static F max(F a, F b) { for (int i = 0; i < ROWS; ++i) a.x[i] = a.x[i] > b.x[i] ? a.x[i] : b.x[i]; return a; }
    static F abs(F a) { for (float &x : a.x) x = std::fabs(x); return a; }
    static float most(F a) { float best = a.x[0]; for (float v : a.x) best = v > best ? v : best; return best; }
    static float sum(F a) { float total = 0.f; for (float v : a.x) total += v; return total; }
    static int32_t sum(I a) { int32_t total = 0; for (int32_t v : a.x) total += v; return total; }
    static bool any_nan(F a) { for (float v : a.x) if (v != v) return true; return false; }
    static I round(F a) { I r; for (int i = 0; i < ROWS; ++i) r.x[i] = a.x[i] == a.x[i] ? int32_t(std::rint(a.x[i])) : 0; return r; }
    static void store_bytes(int8_t *p, I a) { for (int i = 0; i < ROWS; ++i) p[i] = int8_t(a.x[i]); }
    static F halves(const uint16_t *p) { F r; for (int i = 0; i < ROWS; ++i) r.x[i] = half_to_float(p[i]); return r; }
    static I none() { return I{}; }
    static I ones() { I r; for (int32_t &x : r.x) x = 0x01010101; return r; }
    static I add(I a, I b) { for (int i = 0; i < ROWS; ++i) a.x[i] = int32_t(uint32_t(a.x[i]) + uint32_t(b.x[i])); return a; }
    static void store_words(int32_t *p, I a) { std::memcpy(p, a.x, sizeof a); }
    // Sums are unsigned here: a block's missing tokens hold anything, and may overflow.
    static I product(I acc, I a, I b) {
        for (int i = 0; i < ROWS; ++i) acc.x[i] = int32_t(uint32_t(acc.x[i]) + uint32_t(a.x[i]) * uint32_t(b.x[i]));
        return acc;
    }
    static I bytes(const void *p) { I r; std::memcpy(r.x, p, sizeof r); return r; }
    static I unit(const void *p) {
        int32_t v;
        std::memcpy(&v, p, 4);
        I r;
        for (int32_t &x : r.x) x = v;
        return r;
    }
    static F to_float(I a) { F r; for (int i = 0; i < ROWS; ++i) r.x[i] = float(a.x[i]); return r; }
    static I low(I a) { for (int32_t &x : a.x) x &= 0x0f0f0f0f; return a; }
    static I high(I a) { for (int32_t &x : a.x) x = int32_t(uint32_t(x) >> 4 & 0x0f0f0f0f); return a; }
    static I dot(I acc, I w, I a) {
        for (int i = 0; i < ROWS; ++i)
            for (int j = 0; j < 4; ++j)
                acc.x[i] = int32_t(uint32_t(acc.x[i]) + uint32_t(int32_t(uint32_t(w.x[i]) >> 8 * j & 255) * int32_t(int8_t(uint32_t(a.x[i]) >> 8 * j & 255))));
        return acc;
    }
    static F pairs(F acc, I w, I a) {
        for (int i = 0; i < ROWS; ++i) {
            const uint32_t x = uint32_t(w.x[i]), y = uint32_t(a.x[i]);
            acc.x[i] += native::to_float(bf16(x)) * native::to_float(bf16(y));
            acc.x[i] += native::to_float(bf16(x >> 16)) * native::to_float(bf16(y >> 16));
        }
        return acc;
    }
};
#endif

}  // namespace NATIVE_LEVEL
}  // namespace native
