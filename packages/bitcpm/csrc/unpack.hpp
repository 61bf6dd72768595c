// The codes of a span as digits d = c + 1, a byte each, as the products read them: for each 4 columns four vectors of
// 64 bytes, each for 16 rows, 4 columns a row.
#pragma once
#include "layout.hpp"
#include "vectors.hpp"

namespace bitcpm {
inline namespace NATIVE_LEVEL {

// 2bit: n columns are rounded up to 16; the digits beyond n are 1.
inline void unpack_2bit(const char *codes, int64_t n, char *digits) {
    const I mask = set(0x03030303);
    for (int64_t c = 0; c < n; c += 16)
        for (int v = 0; v < 4; ++v, codes += 64) {
            const I x = load(codes);
            char *out = digits + c * 64 + v * 64;
            store(out, both(x, mask));
            store(out + 256, both(shift_right<2>(x), mask));
            store(out + 512, both(shift_right<4>(x), mask));
            store(out + 768, both(shift_right<6>(x), mask));
        }
}

#if defined(__AVX2__)
#if BITCPM_VNNI
using Bytes = __m512i;
constexpr int HALVES = 1;
inline Bytes low8(Bytes a, Bytes b) { return _mm512_unpacklo_epi8(a, b); }
inline Bytes high8(Bytes a, Bytes b) { return _mm512_unpackhi_epi8(a, b); }
inline Bytes low16(Bytes a, Bytes b) { return _mm512_unpacklo_epi16(a, b); }
inline Bytes high16(Bytes a, Bytes b) { return _mm512_unpackhi_epi16(a, b); }
inline void put(char *p, Bytes a) { _mm512_storeu_si512(p, a); }
#else
// Halves of 32 bytes also with AVX-512: without byte permutations there is nothing to gain from 64.
using Bytes = __m256i;
constexpr int HALVES = 2;
inline Bytes low8(Bytes a, Bytes b) { return _mm256_unpacklo_epi8(a, b); }
inline Bytes high8(Bytes a, Bytes b) { return _mm256_unpackhi_epi8(a, b); }
inline Bytes low16(Bytes a, Bytes b) { return _mm256_unpacklo_epi16(a, b); }
inline Bytes high16(Bytes a, Bytes b) { return _mm256_unpackhi_epi16(a, b); }
inline void put(char *p, Bytes a) { _mm256_storeu_si256((__m256i *)p, a); }
#endif

struct DigitTable {
    alignas(64) uint8_t digit[5][128] = {};
    constexpr DigitTable() {
        for (int m = 0; m <= 121; ++m)
            for (int l = 0, u = m + 121; l < 5; ++l, u /= 3) digit[l][m] = uint8_t(u % 3);
    }
};

// Five digits of each byte.
struct Digits {
#if BITCPM_VNNI
    Bytes table[5][2];  // digit of |v| < 128, by |v|
    Digits() {
        static constexpr DigitTable c;
        for (int l = 0; l < 5; ++l)
            for (int h = 0; h < 2; ++h) table[l][h] = _mm512_load_si512(c.digit[l] + 64 * h);
    }
    void of(const char *codes, Bytes *d) const {
        const Bytes x = _mm512_loadu_si512(codes), two = _mm512_set1_epi8(2);
        const __mmask64 negative = _mm512_movepi8_mask(x);
#pragma GCC unroll 5
        for (int l = 0; l < 5; ++l) {
            d[l] = _mm512_permutex2var_epi8(table[l][0], x, table[l][1]);
            d[l] = _mm512_mask_sub_epi8(d[l], negative, two, d[l]);
        }
    }
#else
    void of(const char *codes, Bytes *d) const {
        const Bytes x = _mm256_loadu_si256((const Bytes *)codes), one = _mm256_set1_epi8(1);
        Bytes v = _mm256_sign_epi8(_mm256_and_si256(x, _mm256_set1_epi8(127)), _mm256_or_si256(x, one));
        // The last digit decides by how much v lies beyond what the others can reach: 81 against 40, and so on.
        constexpr int8_t place[] = {1, 3, 9, 27, 81}, reach[] = {0, 1, 4, 13, 40};
#pragma GCC unroll 4
        for (int l = 4; l > 0; --l) {
            const Bytes above = _mm256_cmpgt_epi8(v, _mm256_set1_epi8(reach[l]));
            const Bytes below = _mm256_cmpgt_epi8(_mm256_set1_epi8(int8_t(-reach[l])), v);
            const Bytes sign = _mm256_sub_epi8(below, above);
            d[l] = _mm256_add_epi8(sign, one);
            v = _mm256_sub_epi8(v, _mm256_sign_epi8(_mm256_set1_epi8(place[l]), sign));
        }
        d[0] = _mm256_add_epi8(v, one);
    }
#endif
};

// 1.6bit: n columns are rounded up to 4; the digits beyond n are of any columns and need a zero to multiply. One block of
// a panel of `blocks`.
inline void unpack_1_6bit(const char *codes, int64_t blocks, int64_t n, char *digits) {
    const Digits take;
    const int64_t chunks = div_up(n, 5), quads = div_up(n, 4);
    for (int half = 0; half < HALVES; ++half, codes += 32, digits += 32)
        for (int64_t c = 0, q = 0; c < chunks; c += 4, q += 5) {
            Bytes d[20];
            const int64_t last = chunks - 1;  // read again where there are no 4 chunks left
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) take.of(codes + 64 * blocks * smaller(c + i, last), d + 5 * i);
#pragma GCC unroll 5
            for (int i = 0; i < 5; ++i) {
                if (q + i >= quads) break;
                const Bytes *e = d + 4 * i;
                const Bytes ab = low8(e[0], e[1]), cd = low8(e[2], e[3]);
                const Bytes ef = high8(e[0], e[1]), gh = high8(e[2], e[3]);
                char *out = digits + 256 * (q + i);
                put(out, low16(ab, cd)), put(out + 64, high16(ab, cd));
                put(out + 128, low16(ef, gh)), put(out + 192, high16(ef, gh));
            }
        }
}
#else
inline void unpack_1_6bit(const char *codes, int64_t blocks, int64_t n, char *digits) {
    for (int64_t c = 0; c < n; c += 5)
        for (int64_t r = 0; r < BLOCK; ++r) {
            const uint8_t x = uint8_t(codes[c / 5 * 64 * blocks + 16 * (r / 4 % 4) + r / 16 * 4 + r % 4]);
            int u = 121 + (x & 128 ? -(x & 127) : x);
            for (int64_t l = c; l < c + 5 && l < round_up(n, 4); ++l, u /= 3)
                digits[l / 4 * 256 + r * 4 + l % 4] = char(u % 3);
        }
}
#endif

inline void unpack(int32_t codec, const char *codes, int64_t blocks, int64_t n, char *digits) {
    codec == BITCPM_2BIT ? unpack_2bit(codes, n, digits) : unpack_1_6bit(codes, blocks, n, digits);
}

}  // namespace NATIVE_LEVEL
}  // namespace bitcpm
