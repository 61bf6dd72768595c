// Sixteen lanes of int32 or float32, one set for each instruction level: a lane is an output row.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include "args.h"

#ifndef NATIVE_LEVEL
#define NATIVE_LEVEL scalar
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)
#define BITCPM_VNNI 1
#else
#define BITCPM_VNNI 0
#endif

// The level is part of every name: the linker would otherwise keep one copy of an inline function for all levels.
namespace bitcpm {
inline namespace NATIVE_LEVEL {

inline float from_bf16(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline uint16_t to_bf16(float x) {  // round to nearest even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float from_fp16(uint16_t x) {
    // The exponent moves to float32's place; a multiplication corrects its bias, subnormals included.
    const uint32_t sign = uint32_t(x & 0x8000) << 16, rest = uint32_t(x & 0x7fff) << 13;
    const uint32_t bits = rest >= 0x0f800000 ? rest | 0x7f800000 : rest;
    float value;
    std::memcpy(&value, &bits, 4);
    if (rest < 0x0f800000) value *= 5.192296858534828e33f;  // 2^112
    uint32_t out;
    std::memcpy(&out, &value, 4);
    out |= sign;
    std::memcpy(&value, &out, 4);
    return value;
}
inline uint16_t to_fp16(float x) {
#if defined(__F16C__)
    return uint16_t(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT), 0));
#else
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
    if (bits < 0x38800000) {  // subnormal: the addition rounds to a multiple of 2^-24
        float value;
        std::memcpy(&value, &bits, 4);
        value += 0.5f;
        std::memcpy(&bits, &value, 4);
        return uint16_t(sign | (bits - 0x3f000000));
    }
    return uint16_t(sign | ((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13));
#endif
}
inline float read_float(const void *p, int64_t i, int32_t dtype) {
    if (dtype == BITCPM_FLOAT32) return static_cast<const float *>(p)[i];
    const uint16_t x = static_cast<const uint16_t *>(p)[i];
    return dtype == BITCPM_BFLOAT16 ? from_bf16(x) : from_fp16(x);
}
inline void write_float(void *p, int64_t i, float x, int32_t dtype) {
    if (dtype == BITCPM_FLOAT32)
        static_cast<float *>(p)[i] = x;
    else
        static_cast<uint16_t *>(p)[i] = dtype == BITCPM_BFLOAT16 ? to_bf16(x) : to_fp16(x);
}

#if defined(__AVX512F__)
using I = __m512i;
using F = __m512;
inline I zero() { return _mm512_setzero_si512(); }
inline I set(int32_t x) { return _mm512_set1_epi32(x); }
inline I load(const void *p) { return _mm512_loadu_si512(p); }
inline void store(void *p, I a) { _mm512_storeu_si512(p, a); }
inline I add(I a, I b) { return _mm512_add_epi32(a, b); }
inline I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
inline I both(I a, I b) { return _mm512_and_si512(a, b); }
template <int N> inline I shift_right(I a) { return _mm512_srli_epi32(a, N); }
template <int N> inline I shift_signed(I a) { return _mm512_srai_epi32(a, N); }
// acc + the products of 4 unsigned bytes (at most 2 each without VNNI) and 4 signed bytes of each lane.
inline I dot(I acc, I u, I s) {
#if BITCPM_VNNI
    // Not the intrinsic: GCC copies the accumulator before each one.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(s));
    return acc;
#else
    return add(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(u, s), _mm512_set1_epi16(1)));
#endif
}
inline F fzero() { return _mm512_setzero_ps(); }
inline F fset(float x) { return _mm512_set1_ps(x); }
inline F fload(const float *p) { return _mm512_loadu_ps(p); }
inline void fstore(float *p, F a) { _mm512_storeu_ps(p, a); }
inline F fadd(F a, F b) { return _mm512_add_ps(a, b); }
inline F fmul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
// c = d - 1 as float, of the digit d in the lowest byte of each lane.
inline F level_of(I a) {
    return _mm512_permutexvar_ps(a, _mm512_set_ps(0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0, -1));
}
// acc + c x, where the product is exact.
inline F accumulate(F acc, F c, F x) { return _mm512_fmadd_ps(c, x, acc); }
inline F scales(const char *p, int32_t dtype) {
    if (dtype == BITCPM_FLOAT32) return _mm512_loadu_ps(p);
    const __m256i half = _mm256_loadu_si256((const __m256i *)p);
    if (dtype == BITCPM_FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline I bits_of(F a) { return _mm512_castps_si512(a); }
inline I maximum(I a, I b) { return _mm512_max_epi32(a, b); }
inline void store_bytes(int8_t *p, I a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(a)); }
inline void store_bf16(void *p, F a) {
    // Like to_bf16: the rounding instruction is not in every processor of this level.
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    rounded = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), rounded, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(rounded));
}
#elif defined(__AVX2__)
struct I { __m256i a, b; };
struct F { __m256 a, b; };
inline I zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I load(const void *p) {
    return {_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1)};
}
inline void store(void *p, I x) {
    _mm256_storeu_si256((__m256i *)p, x.a), _mm256_storeu_si256((__m256i *)p + 1, x.b);
}
inline I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I sub(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I both(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
template <int N> inline I shift_right(I x) { return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)}; }
template <int N> inline I shift_signed(I x) { return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)}; }
inline __m256i dot_half(__m256i acc, __m256i u, __m256i s) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}
inline I dot(I acc, I u, I s) { return {dot_half(acc.a, u.a, s.a), dot_half(acc.b, u.b, s.b)}; }
// Digits are so small that 16 bits hold sums of their products with 128 columns, at half the multiplications. Sums stay in
// their registers: GCC would add in another order, for which it makes all products first.
constexpr int64_t WORD_COLUMNS = 128;
inline I dot_words(I acc, I u, I s) {
    acc = {_mm256_add_epi16(acc.a, _mm256_maddubs_epi16(u.a, s.a)), _mm256_add_epi16(acc.b, _mm256_maddubs_epi16(u.b, s.b))};
    __asm__("" : "+x"(acc.a), "+x"(acc.b));
    return acc;
}
inline I begin_words(I) { return zero(); }
inline I end_words(I sum, I words) {
    const __m256i one = _mm256_set1_epi16(1);
    return add(sum, {_mm256_madd_epi16(words.a, one), _mm256_madd_epi16(words.b, one)});
}
inline F fzero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F fset(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F fload(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void fstore(float *p, F x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline F fadd(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F fmul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline F level_of(I x) {
    const __m256 levels = _mm256_set_ps(0, 1, 0, -1, 0, 1, 0, -1);
    return {_mm256_permutevar8x32_ps(levels, x.a), _mm256_permutevar8x32_ps(levels, x.b)};
}
inline F accumulate(F acc, F c, F x) { return {_mm256_fmadd_ps(c.a, x.a, acc.a), _mm256_fmadd_ps(c.b, x.b, acc.b)}; }
inline __m256 scales_half(const char *p, int32_t dtype) {
    const __m128i half = _mm_loadu_si128((const __m128i *)p);
    if (dtype == BITCPM_FLOAT16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline F scales(const char *p, int32_t dtype) {
    if (dtype == BITCPM_FLOAT32) return fload(reinterpret_cast<const float *>(p));
    return {scales_half(p, dtype), scales_half(p + 16, dtype)};
}
inline I bits_of(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline I maximum(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
inline void store_bytes(int8_t *p, I x) {  // of values that fit
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
#else
struct I { int32_t x[16]; };
struct F { float x[16]; };
#define EACH for (int i = 0; i < 16; ++i)
inline I zero() { return {}; }
inline I set(int32_t v) { I r; EACH r.x[i] = v; return r; }
inline I load(const void *p) { I r; std::memcpy(r.x, p, 64); return r; }
inline void store(void *p, I a) { std::memcpy(p, a.x, 64); }
inline I add(I a, I b) { EACH a.x[i] += b.x[i]; return a; }
inline I sub(I a, I b) { EACH a.x[i] -= b.x[i]; return a; }
inline I both(I a, I b) { EACH a.x[i] &= b.x[i]; return a; }
template <int N> inline I shift_right(I a) { EACH a.x[i] = int32_t(uint32_t(a.x[i]) >> N); return a; }
template <int N> inline I shift_signed(I a) { EACH a.x[i] >>= N; return a; }
inline I dot(I acc, I u, I s) {
    EACH {
        const uint32_t a = uint32_t(u.x[i]), b = uint32_t(s.x[i]);
        for (int j = 0; j < 32; j += 8) acc.x[i] += int32_t((a >> j) & 255) * int8_t(b >> j);
    }
    return acc;
}
inline F fzero() { return {}; }
inline F fset(float v) { F r; EACH r.x[i] = v; return r; }
inline F fload(const float *p) { F r; std::memcpy(r.x, p, 64); return r; }
inline void fstore(float *p, F a) { std::memcpy(p, a.x, 64); }
inline F fadd(F a, F b) { EACH a.x[i] += b.x[i]; return a; }
inline F fmul(F a, F b) { EACH a.x[i] *= b.x[i]; return a; }
inline F to_float(I a) { F r; EACH r.x[i] = float(a.x[i]); return r; }
inline F level_of(I a) { F r; EACH r.x[i] = float(a.x[i] & 3) - 1; return r; }
inline F accumulate(F acc, F c, F x) { EACH acc.x[i] += c.x[i] * x.x[i]; return acc; }
inline F scales(const char *p, int32_t dtype) { F r; EACH r.x[i] = read_float(p, i, dtype); return r; }
inline I bits_of(F a) { I r; std::memcpy(r.x, a.x, 64); return r; }
inline I maximum(I a, I b) { EACH a.x[i] = a.x[i] > b.x[i] ? a.x[i] : b.x[i]; return a; }
inline void store_bytes(int8_t *p, I a) { EACH p[i] = int8_t(a.x[i]); }
#undef EACH
#endif

#if !defined(__AVX2__) || defined(__AVX512F__)
constexpr int64_t WORD_COLUMNS = int64_t(1) << 30;  // there is a dot product, or nothing to gain
inline I begin_words(I sum) { return sum; }
inline I dot_words(I acc, I u, I s) { return dot(acc, u, s); }
inline I end_words(I, I words) { return words; }
#endif

#if !defined(__AVX512F__)
inline void store_bf16(void *p, F a) {
    float x[16];
    fstore(x, a);
    for (int i = 0; i < 16; ++i) static_cast<uint16_t *>(p)[i] = to_bf16(x[i]);
}
#endif

// Four bytes, or one float, of memory in every lane.
inline I broadcast(const int8_t *p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return set(x);
}

}  // namespace NATIVE_LEVEL
}  // namespace bitcpm
