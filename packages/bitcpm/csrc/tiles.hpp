// Integer products of many tokens on the processor's matrix tiles (AMX): 32 tokens by 32 rows at a time, exact int32 as
// everywhere else.
#pragma once
#include "layout.hpp"
#include "vectors.hpp"
#if defined(__AMX_TILE__)
#define BITCPM_TILES 1
#include "amx.hpp"
#else
#define BITCPM_TILES 0
#endif

namespace bitcpm {
inline namespace NATIVE_LEVEL {

constexpr int64_t TILE_TOKENS = 16, TILE_COLUMNS = 64;  // tokens or rows, and columns of a tile

#if BITCPM_TILES
using namespace native;

// Digits [columns / 4][64][4] end with zeros up to whole tiles, so that nothing comes from what activations follow.
inline void fill_up(char *digits, int64_t columns) {
    const int64_t from = div_up(columns, 4) * 4 * BLOCK, to = round_up(columns, TILE_COLUMNS) * BLOCK;
    std::memset(digits + from, 0, size_t(to - from));
}

// sums [32][64] (of 16 tokens, if not TWO; columns v and v + 1 of its four sixteens) = those in `before`, or 0, + the
// products of activations x, whose rows lie `stride` bytes from each other, with digits.
template <bool TWO>
inline void tile_products(const int8_t *x, int64_t stride, const char *digits, int64_t columns, int v, const int32_t *before, int32_t *sums) {
    constexpr int64_t next = TILE_TOKENS * BLOCK;
    if (before) {
        tile_load<0>(before + v * 16, 4 * BLOCK);
        tile_load<1>(before + v * 16 + 16, 4 * BLOCK);
        if constexpr (TWO) {
            tile_load<2>(before + next + v * 16, 4 * BLOCK);
            tile_load<3>(before + next + v * 16 + 16, 4 * BLOCK);
        }
    } else {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    }
    digits += v * 64;
    for (int64_t c = 0; c < columns; c += TILE_COLUMNS, digits += TILE_COLUMNS * BLOCK) {
        tile_load<6>(digits, 4 * BLOCK);
        tile_load<4>(x + c, stride);
        tile_dot_int8_uint8<0, 4, 6>();
        tile_load<7>(digits + 64, 4 * BLOCK);
        tile_dot_int8_uint8<1, 4, 7>();
        if constexpr (TWO) {
            tile_load<5>(x + TILE_TOKENS * stride + c, stride);
            tile_dot_int8_uint8<2, 5, 6>();
            tile_dot_int8_uint8<3, 5, 7>();
        }
    }
    tile_store<0>(sums + v * 16, 4 * BLOCK);
    tile_store<1>(sums + v * 16 + 16, 4 * BLOCK);
    if constexpr (TWO) {
        tile_store<2>(sums + next + v * 16, 4 * BLOCK);
        tile_store<3>(sums + next + v * 16 + 16, 4 * BLOCK);
    }
}

#endif

}  // namespace NATIVE_LEVEL
}  // namespace bitcpm
