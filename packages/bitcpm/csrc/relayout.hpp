// Codes and scales to the kernel layout and back: plain loops, one set for all levels.
#pragma once
#include <cstring>
#include "layout.hpp"

namespace bitcpm {

// Calls codes(block, part, first column, the span's codes, blocks of the strip) and scales(block, group, their place).
template <class Codes, class Scales>
void walk(const bitcpm_layout_args *a, int32_t ith, int32_t nth, Codes codes, Scales scales) {
    const bitcpm_shape &s = a->shape;
    const int64_t blocks = blocks_of(s);
    for (int64_t block = share(blocks, ith, nth); block < share(blocks, ith + 1, nth); ++block) {
        const Place place(s, block);
        char *p = a->weights + place.start;
        int64_t column = 0;
        each_part(s, [&](const Part &part) {
            codes(block, part, column, p + place.codes(part), place.strip_blocks);
            if (part.ends) scales(block, part.group, p + place.scales(part, s));
            p += place.panel_blocks * part.unit;
            column += part.columns;
        });
    }
}

// Byte of a span's codes that holds column c, row r of the block.
inline int64_t byte_2bit(int64_t c, int64_t r) { return c / 16 * 256 + r / 16 * 64 + r % 16 * 4 + c % 4; }
inline int64_t byte_1_6bit(int64_t c, int64_t r, int64_t blocks) { return c / 5 * 64 * blocks + r / 4 % 4 * 16 + r / 16 * 4 + r % 4; }
constexpr int PLACE[5] = {1, 3, 9, 27, 81};

inline int32_t lay_out(const bitcpm_layout_args *a, int32_t ith, int32_t nth) {
    const bitcpm_shape &s = a->shape;
    if (!valid(s)) return 1;
    if (!aligned(a->weights)) return 2;
    const int64_t groups = groups_of(s), width = scale_bytes(s);
    walk(a, ith, nth,
         [&](int64_t block, const Part &part, int64_t first, char *p, int64_t blocks) {
             const int64_t n = part.columns;
             // Code 0 everywhere first: 2bit digits are 1, and |v| is 0.
             if (s.codec == BITCPM_2BIT) std::memset(p, 0x55, size_t(part.codes));
             else for (int64_t c = 0; c < n; c += 5) std::memset(p + c / 5 * 64 * blocks, 0, 64);
             for (int64_t r = 0; r < smaller(BLOCK, s.rows - block * BLOCK); ++r) {
                 const int8_t *row = a->codes + (block * BLOCK + r) * s.columns + first;
                 if (s.codec == BITCPM_2BIT) {
                     for (int64_t c = 0; c < n; ++c) p[byte_2bit(c, r)] = char(p[byte_2bit(c, r)] + row[c] * (1 << (c % 16 / 4 * 2)));
                 } else {
                     for (int64_t c = 0; c < n; c += 5) {
                         int v = 0;
                         for (int64_t l = 0; l < smaller(5, n - c); ++l) v += PLACE[l] * row[c + l];
                         p[byte_1_6bit(c, r, blocks)] = char(v < 0 ? 128 - v : v);
                     }
                 }
             }
         },
         [&](int64_t block, int64_t g, char *p) {
             std::memset(p, 0, size_t(BLOCK * width));
             for (int64_t r = 0; r < smaller(BLOCK, s.rows - block * BLOCK); ++r)
                 std::memcpy(p + r * width, a->scales + ((block * BLOCK + r) * groups + g) * width, size_t(width));
         });
    return 0;
}

inline int32_t take_out(const bitcpm_layout_args *a, int32_t ith, int32_t nth) {
    const bitcpm_shape &s = a->shape;
    if (!valid(s)) return 1;
    if (!aligned(a->weights)) return 2;
    const int64_t groups = groups_of(s), width = scale_bytes(s);
    walk(a, ith, nth,
         [&](int64_t block, const Part &part, int64_t first, const char *p, int64_t blocks) {
             const int64_t n = part.columns;
             for (int64_t r = 0; r < smaller(BLOCK, s.rows - block * BLOCK); ++r) {
                 int8_t *row = a->codes + (block * BLOCK + r) * s.columns + first;
                 for (int64_t c = 0; c < n; ++c) {
                     if (s.codec == BITCPM_2BIT) {
                         row[c] = int8_t((uint8_t(p[byte_2bit(c, r)]) >> (c % 16 / 4 * 2) & 3) - 1);
                     } else {
                         const uint8_t x = uint8_t(p[byte_1_6bit(c, r, blocks)]);
                         const int u = 121 + (x & 128 ? -(x & 127) : x);
                         row[c] = int8_t(u / PLACE[c % 5] % 3 - 1);
                     }
                 }
             }
         },
         [&](int64_t block, int64_t g, const char *p) {
             for (int64_t r = 0; r < smaller(BLOCK, s.rows - block * BLOCK); ++r)
                 std::memcpy(a->scales + ((block * BLOCK + r) * groups + g) * width, p + r * width, size_t(width));
         });
    return 0;
}

}  // namespace bitcpm
