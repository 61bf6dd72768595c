// Matrix-vector product of 1.6bit weights by table: the 5 activations of a chunk have 243 sums c0 x0 + ... + c4 x4, and a
// byte of weights is the name of one of them. 64 rows look theirs up at once (VBMI: a table of 128 bytes is two registers).
//
// A sum t is at most 640. It is kept as two signed bytes with t = low + 36 high, both at most 18, for |v|; where v < 0 both
// change their sign. Bytes add up 7 chunks (7 * 18 < 128), then go to int16 and at the end of a span to int32. 320 weights
// take 2 look-ups and 6 simple instructions, 4 cycles at best; decoding their digits for VNNI takes 15.
#pragma once
#include "layout.hpp"
#include "vectors.hpp"

#if BITCPM_VNNI
namespace bitcpm {
inline namespace NATIVE_LEVEL {

// Sums are put together from those of the first three columns (t = -13 ... 13) and of the last two (p = 0 ... 4).
struct TableConstants {
    alignas(64) int8_t digit[3][64] = {};
    alignas(64) int16_t offset[32] = {}, first[4][32] = {}, last[4][32] = {};
    constexpr TableConstants() {
        for (int i = 0; i < 32; ++i) {
            // Lanes 0 to 26 have columns 0 to 2, lanes 27 to 31 have columns 3 and 4.
            int sum = 0;
            for (int l = i < 27 ? 0 : 3, u = i < 27 ? i : i - 27 + 4; l < (i < 27 ? 3 : 5); ++l, u /= 3) {
                digit[l / 2][2 * i + l % 2] = int8_t(u % 3 - 1);
                sum += u % 3 - 1;
            }
            offset[i] = int16_t(-128 * sum);
        }
        for (int m = 0; m < 128; ++m) {
            // Narrowing takes 8 words from one vector, then 8 from the next: sum[q] holds these m.
            const int q = m / 64 * 2 + m / 8 % 2, i = m % 64 / 16 * 8 + m % 8, pair = (m + 13) / 27;
            first[q][i] = int16_t(m - 27 * pair + 13);
            last[q][i] = int16_t((27 + pair) & 31);  // m > 121 is no sum
        }
    }
};

struct TableMaker {
    __m512i digit[3], offset, first[4], last[4];
    TableMaker() {
        static constexpr TableConstants c;
        for (int l = 0; l < 3; ++l) digit[l] = _mm512_load_si512(c.digit[l]);
        for (int q = 0; q < 4; ++q) first[q] = _mm512_load_si512(c.first[q]), last[q] = _mm512_load_si512(c.last[q]);
        offset = _mm512_load_si512(c.offset);
    }
    static __m512i pair(const uint8_t *p) {
        int16_t x;
        std::memcpy(&x, p, 2);
        return _mm512_set1_epi16(x);
    }
    // The tables of n <= SPAN columns: for each chunk the low bytes of |v| = 0 ... 127, then the high bytes.
    void make(const int8_t *x, int64_t n, char *out) const {
        // Products want one side unsigned: activations plus 128, which `offset` takes off again.
        alignas(64) uint8_t u[SPAN + 80];
        for (int64_t i = 0; i < n; ++i) u[i] = uint8_t(x[i] + 128);
        std::memset(u + n, 128, 8);
        const __m512i inverse = _mm512_set1_epi16(910);
        __m512i radix = _mm512_set1_epi16(36);
        __asm__("" : "+v"(radix));  // or GCC makes shifts of it, which wait for the permutations' pipe
        const TableMaker own = *this;  // in registers: what is written might be this, for all the compiler knows
        for (int64_t c = 0; c < n; c += 5, out += TABLE) {
            __m512i base = _mm512_add_epi16(own.offset, _mm512_maddubs_epi16(pair(u + c), own.digit[0]));
            base = _mm512_add_epi16(base, _mm512_maddubs_epi16(pair(u + c + 2), own.digit[1]));
            base = _mm512_add_epi16(base, _mm512_maddubs_epi16(pair(u + c + 4), own.digit[2]));
            __m512i low[4], high[4];
#pragma GCC unroll 4
            for (int q = 0; q < 4; ++q) {
                const __m512i sum = _mm512_add_epi16(_mm512_permutexvar_epi16(own.first[q], base), _mm512_permutexvar_epi16(own.last[q], base));
                high[q] = _mm512_mulhrs_epi16(sum, inverse);  // sum / 36, to the nearest
                low[q] = _mm512_sub_epi16(sum, _mm512_mullo_epi16(high[q], radix));
            }
#pragma GCC unroll 2
            for (int q = 0; q < 2; ++q) {
                _mm512_store_si512(out + 64 * q, _mm512_packs_epi16(low[2 * q], low[2 * q + 1]));
                _mm512_store_si512(out + 128 + 64 * q, _mm512_packs_epi16(high[2 * q], high[2 * q + 1]));
            }
        }
    }
};

// int32 sums of a span of n columns, added to sum[r][v]: a strip of R blocks.
template <int R>
inline void look_up(const char *codes, const char *table, int64_t n, I (*sum)[4]) {
    const __m512i none = _mm512_setzero_si512(), radix = _mm512_set1_epi16(36 * 256 + 1);
    __m512i a[R], b[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = b[r] = none;
    for (int64_t left = div_up(n, 5); left > 0; left -= 7) {
        __m512i low[R], high[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) low[r] = high[r] = none;
        for (int64_t c = smaller(left, 7); c > 0; --c, codes += 64 * R, table += TABLE) {
            const __m512i low0 = _mm512_load_si512(table), low1 = _mm512_load_si512(table + 64);
            const __m512i high0 = _mm512_load_si512(table + 128), high1 = _mm512_load_si512(table + 192);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const char *p = codes + 64 * r;
                __builtin_prefetch(p + FAR_AHEAD);
                const __m512i x = _mm512_load_si512(p);
                const __mmask64 negative = _mm512_movepi8_mask(x);
                const __m512i l = _mm512_permutex2var_epi8(low0, x, low1);
                const __m512i h = _mm512_permutex2var_epi8(high0, x, high1);
                low[r] = _mm512_add_epi8(low[r], _mm512_mask_sub_epi8(l, negative, none, l));
                high[r] = _mm512_add_epi8(high[r], _mm512_mask_sub_epi8(h, negative, none, h));
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            a[r] = _mm512_add_epi16(a[r], _mm512_maddubs_epi16(radix, _mm512_unpacklo_epi8(low[r], high[r])));
            b[r] = _mm512_add_epi16(b[r], _mm512_maddubs_epi16(radix, _mm512_unpackhi_epi8(low[r], high[r])));
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        // Each 16 bits twice, then shifted down with their sign.
        sum[r][0] = add(sum[r][0], shift_signed<16>(_mm512_unpacklo_epi16(a[r], a[r])));
        sum[r][1] = add(sum[r][1], shift_signed<16>(_mm512_unpackhi_epi16(a[r], a[r])));
        sum[r][2] = add(sum[r][2], shift_signed<16>(_mm512_unpacklo_epi16(b[r], b[r])));
        sum[r][3] = add(sum[r][3], shift_signed<16>(_mm512_unpackhi_epi16(b[r], b[r])));
    }
}

}  // namespace NATIVE_LEVEL
}  // namespace bitcpm
#endif
