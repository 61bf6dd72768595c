// Products of many tokens on the processor's matrix tiles (AMX): 32 tokens by 32 rows at a time, in bfloat16 with sums
// in float32. Weights of 8 and 4 bits are widened first, once for all tokens of a step.
//
// A block of 16 tokens lies as [cols / 32][16][32], so that a tile is one piece of memory; a panel of weights in
// bfloat16, [cols / 2][16][2], is a row of tiles as it is.
#pragma once
#include "args.h"
#include "formats.hpp"
#include "panel.hpp"
#if defined(__AMX_TILE__)
#include "amx.hpp"
#endif

namespace native {
inline namespace NATIVE_LEVEL {

constexpr int TILE_TOKENS = 16, TILE_COLUMNS = 32;
constexpr int MOST_GROUP = 512;  // columns that share a factor

// So few tokens are multiplied as one is: widening would cost more, and what several tokens say in one step, as in
// speculation, is what each says alone.
constexpr int64_t FEW_TOKENS = 16;

// Whether rows of a step of `tokens` are laid out for tiles, for weights of this kind.
inline bool in_tiles(int32_t kind, int64_t cols, int64_t tokens) {
#if defined(__AMX_TILE__)
    return tokens > FEW_TOKENS && cols % TILE_COLUMNS == 0 && (kind == CPMCU_BFLOAT16 || kind == CPMCU_INT8 || kind == CPMCU_INT4);
#else
    return (void)kind, (void)cols, (void)tokens, false;
#endif
}

// Whether the product with `m` hands on silu(first half of its rows) * second half, laid out for tiles in `to`.
inline bool gated_in_tiles(const cpmcu_matrix &m, const cpmcu_packed &to, int64_t tokens) {
    return to.data && to.cols % ROWS == 0 && in_tiles(m.kind, m.cols, tokens) && in_tiles(to.kind, to.cols, tokens);
}

// silu(gate) * up.
inline void gated(const float *gate, const float *up, int64_t n, float *y) {
    using Lanes = Wide;
    constexpr int L = Lanes::L;
    int64_t i = 0;
    const auto minus_log2e = Lanes::set(-LOG2E), one = Lanes::set(1.f);
    for (; i + L <= n; i += L) {
        const auto x = Lanes::load(gate + i);
        const auto below = Lanes::add(one, Lanes::exp2(Lanes::mul(x, minus_log2e)));
        Lanes::store(y + i, Lanes::div(Lanes::mul(x, Lanes::load(up + i)), below));
    }
    for (; i < n; ++i) y[i] = gate[i] * up[i] / (1.f + std::exp(-gate[i]));
}

#if defined(__AMX_TILE__)

// Columns [column, column + 16) of row `token`.
inline void place_some_in_tiles(const float *x, int64_t cols, int64_t token, int64_t column, uint16_t *data) {
    uint16_t *to = data + token / TILE_TOKENS * TILE_TOKENS * cols + column / TILE_COLUMNS * TILE_TOKENS * TILE_COLUMNS +
                   token % TILE_TOKENS * TILE_COLUMNS + column % TILE_COLUMNS;
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x)));
}

// Row `token` from floats [cols].
inline void place_in_tiles(const float *x, int64_t cols, int64_t token, uint16_t *data) {
    uint16_t *to = data + token / TILE_TOKENS * TILE_TOKENS * cols + token % TILE_TOKENS * TILE_COLUMNS;
    for (int64_t k = 0; k < cols; k += TILE_COLUMNS, to += TILE_TOKENS * TILE_COLUMNS)
        _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + k + 16), _mm512_loadu_ps(x + k)));
}

// 16 floats of one column and 16 of the next, as a row of a tile.
inline void store_pairs(uint16_t *to, __m512 even, __m512 odd) {
    alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    _mm512_store_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(order), both));
}

// A panel of 8 or 4 bits as [cols / 2][16][2] in bfloat16.
template <int BITS> inline void widen_to_pairs(const uint8_t *from, const uint16_t *scales, const uint16_t *shifts, int64_t cols, int group, uint16_t *to) {
    constexpr int COLUMNS = 32 / BITS;  // in a lane
    const __m512i mask = _mm512_set1_epi32((1 << BITS) - 1);
    for (int64_t g = 0; g < cols / group; ++g, scales += ROWS) {
        const __m512 scale = Panel::halves(scales), zero = _mm512_set1_ps(-float(1 << (BITS - 1)));
        const __m512 start = shifts ? _mm512_fmadd_ps(scale, zero, Panel::halves(shifts + g * ROWS)) : _mm512_mul_ps(scale, zero);
        for (int k = 0; k < group; k += COLUMNS, from += 64, to += COLUMNS * ROWS) {
            const __m512i lanes = _mm512_loadu_si512(from);
            __m512 x[COLUMNS];
            // The four bytes of a lane are columns; of 4 bits, the upper halves are the next four.
#pragma GCC unroll 8
            for (int c = 0; c < COLUMNS; ++c) {
                const __m512i code = _mm512_and_si512(_mm512_srli_epi32(lanes, c % 4 * 8 + c / 4 * 4), mask);
                x[c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), scale, start);
            }
#pragma GCC unroll 4
            for (int c = 0; c < COLUMNS; c += 2) store_pairs(to + c * ROWS, x[c], x[c + 1]);
        }
    }
}

// So many columns of all tokens stay in the second-level cache while the weights pass by. Gates take more at a time: their
// unfinished sums are large, and would go to memory and back.
constexpr int64_t MOST_SUMMED = 1024, MOST_GATED = 4096;
static_assert(MOST_SUMMED % MOST_GROUP == 0 && MOST_GATED % MOST_GROUP == 0);

// out [R][32][16] of `count` columns, of 32 tokens (of 16, if not TWO) and R panels; `apart`: from one to the other, in numbers.
template <bool TWO, int R>
inline void tile_products(const uint16_t *a, int64_t cols, const uint16_t *w, int64_t apart, int64_t count, float *out) {
    tile_zero<0>();
    if constexpr (R == 2) tile_zero<1>();
    if constexpr (TWO) tile_zero<2>();
    if constexpr (TWO && R == 2) tile_zero<3>();
    const int64_t next = TILE_TOKENS * cols;  // the other tokens
    for (int64_t k = 0; k < TILE_TOKENS * count; k += TILE_TOKENS * TILE_COLUMNS) {
        tile_load<6>(w + k, 64);
        tile_load<4>(a + k, 64);
        tile_dot_bf16<0, 4, 6>();
        if constexpr (TWO) {
            tile_load<5>(a + next + k, 64);
            tile_dot_bf16<2, 5, 6>();
        }
        if constexpr (R == 2) {
            tile_load<7>(w + apart + k, 64);
            tile_dot_bf16<1, 4, 7>();
            if constexpr (TWO) tile_dot_bf16<3, 5, 7>();
        }
    }
    tile_store<0>(out, 64);
    if constexpr (TWO) tile_store<2>(out + TILE_TOKENS * ROWS, 64);
    if constexpr (R == 2) tile_store<1>(out + 2 * TILE_TOKENS * ROWS, 64);
    if constexpr (TWO && R == 2) tile_store<3>(out + 3 * TILE_TOKENS * ROWS, 64);
}

#endif

}  // namespace NATIVE_LEVEL
}  // namespace native
