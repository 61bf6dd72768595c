// Where things lie: groups, spans, and the bytes of weights and prepared activations.
#pragma once
#include "args.h"

namespace bitcpm {

// Rows that are interleaved, and the longest span: a multiple of 5 and of 16, and 240 * 128 fits int16.
constexpr int64_t BLOCK = 64, SPAN = 240;
// Bytes of packed weights that one token's product asks memory for before it needs them. Processors foresee a stream, but
// stop at every page of 4 KB.
constexpr int64_t FAR_AHEAD = 4096;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

inline int64_t group_of(const bitcpm_shape &s) { return smaller(s.group, s.columns); }
inline int64_t groups_of(const bitcpm_shape &s) { return div_up(s.columns, group_of(s)); }
inline int64_t blocks_of(const bitcpm_shape &s) { return div_up(s.rows, BLOCK); }
inline int64_t scale_bytes(const bitcpm_shape &s) { return s.scale_dtype == BITCPM_FLOAT32 ? 4 : 2; }

// Bytes of the codes of n columns of a block (SPAN makes this additive over a group).
inline int64_t code_bytes(int32_t codec, int64_t n) {
    return BLOCK * (codec == BITCPM_2BIT ? 4 * div_up(n, 16) : div_up(n, 5));
}
inline int64_t group_bytes(const bitcpm_shape &s, int64_t n) {
    return code_bytes(s.codec, n) + BLOCK * scale_bytes(s);
}
inline int64_t block_bytes(const bitcpm_shape &s) {
    const int64_t g = group_of(s), full = s.columns / g, tail = s.columns % g;
    return full * group_bytes(s, g) + (tail ? group_bytes(s, tail) : 0);
}

// 1.6bit: blocks that are interleaved in a strip, and the most in a panel. The product does a strip at once and wants to
// read one stream; a panel passes by each span's tables while these are in the nearest cache. Where there are few blocks,
// threads are to have some each.
constexpr int64_t MOST_STRIP = 4, MOST_PANEL = 16;
inline int64_t strip_of(const bitcpm_shape &s) {
    const int64_t blocks = blocks_of(s);
    return s.codec == BITCPM_2BIT || blocks < 4 ? 1 : blocks < 8 ? 2 : MOST_STRIP;
}
inline int64_t panel_of(const bitcpm_shape &s) { return s.codec == BITCPM_2BIT ? 1 : MOST_PANEL; }
inline int64_t strips_of(const bitcpm_shape &s) { return div_up(blocks_of(s), strip_of(s)); }

// A part of a panel: one span, and where the scales of its group follow, these.
struct Part {
    int64_t group, column, columns;  // its group and its columns
    int64_t first;                   // of its columns in the padded activations
    bool begins, ends;               // the group
    int64_t codes, unit;             // bytes of the codes of a block; of codes and scales
};
template <class Each> inline void each_part(const bitcpm_shape &s, Each each) {
    const int64_t most = group_of(s);
    for (int64_t g = 0, column = 0; column < s.columns; ++g, column += most) {
        const int64_t n = smaller(most, s.columns - column);
        for (int64_t done = 0; done < n; done += SPAN) {
            Part part{g, column + done, smaller(SPAN, n - done), g * round_up(most, 16) + done, done == 0, done + SPAN >= n, 0, 0};
            part.codes = code_bytes(s.codec, part.columns);
            part.unit = part.codes + (part.ends ? BLOCK * scale_bytes(s) : 0);
            each(part);
        }
    }
}

// Where one block is.
struct Place {
    int64_t panel_blocks;         // of its panel, fewer in the last one
    int64_t strip, strip_blocks;  // blocks of the panel before its strip; blocks of its strip
    int64_t at;                   // in its strip
    int64_t start;                // bytes before its panel
    Place(const bitcpm_shape &s, int64_t block) {
        const int64_t first = block - block % panel_of(s);
        panel_blocks = smaller(panel_of(s), blocks_of(s) - first);
        at = (block - first) % strip_of(s), strip = block - first - at;
        strip_blocks = smaller(strip_of(s), panel_blocks - strip);
        start = first * block_bytes(s);
    }
    int64_t codes(const Part &part) const { return strip * part.unit + at * 64; }
    int64_t scales(const Part &part, const bitcpm_shape &s) const {
        return strip * part.unit + strip_blocks * part.codes + at * BLOCK * scale_bytes(s);
    }
};

// ---- prepared activations: for each token a row of values, padded so that every span begins at a multiple of 16
// columns. Rows lie an odd number of cache lines apart: a power of two would put all of them in the same cache set.
inline int64_t padded_columns(const bitcpm_shape &s) {
    const int64_t g = group_of(s), full = s.columns / g, tail = s.columns % g;
    return full * round_up(g, 16) + round_up(tail, 16);
}
inline int64_t value_bytes(const bitcpm_shape &s, int32_t mode) {
    const int64_t lines = div_up(padded_columns(s) * (mode == BITCPM_EXACT ? 4 : 1), 64);
    return 64 * (lines | 1);
}
// Then for each token, by group: the sum of its int8 values; and their scales (mode 0: all the same).
inline int64_t groups_padded(const bitcpm_shape &s) { return round_up(groups_of(s), 16); }
inline int64_t parts_of(const bitcpm_shape &s) {
    const int64_t g = group_of(s), full = s.columns / g, tail = s.columns % g;
    return full * div_up(g, SPAN) + div_up(tail, SPAN);
}
struct Prepared {
    int64_t values, sums, scales;         // offsets
    int64_t value_stride, group_stride;  // bytes from token to token
    int64_t bytes;
    Prepared(const bitcpm_shape &s, int64_t tokens, int32_t mode) {
        value_stride = value_bytes(s, mode);
        group_stride = mode != BITCPM_EXACT ? 4 * groups_padded(s) : 0;
        values = 0;
        sums = values + tokens * value_stride;
        scales = sums + tokens * group_stride;
        bytes = scales + tokens * group_stride;
    }
};

// ---- scratch
// For each token, for each 5 columns, the table of sums (see tables.hpp). Every thread makes its own: the other's would
// have to come from its cache, which takes ten times as long.
constexpr int64_t TABLE = 256;
inline int64_t tables_of(const bitcpm_shape &s) {
    const int64_t g = group_of(s), full = s.columns / g, tail = s.columns % g;
    return full * div_up(g, 5) + div_up(tail, 5);
}
// With more tokens the weights are unpacked once for all of them instead.
constexpr int64_t TABLE_TOKENS = 4;

// Tokens whose float32 sums of one block wait in the second-level cache.
constexpr int64_t MOST_TOKENS = 512;

// Columns whose digits wait unpacked in the second-level cache, where tiles multiply them, and the most spans of these.
constexpr int64_t DIGIT_COLUMNS = 4096, MOST_WAITING = 128;

// A thread's scratch: digits of a span or of some; for each token the sums of a block so far, and those of an unfinished group; tables.
struct Work {
    int64_t digits, sums, partial, tables, table_stride, bytes;
    Work(const bitcpm_shape &s, int64_t tokens, bool with_tables) {
        const int64_t most = smaller(tokens, MOST_TOKENS) * BLOCK * 4;
        digits = 0;
        sums = digits + BLOCK * (DIGIT_COLUMNS + round_up(SPAN, 64));
        partial = sums + most;
        tables = partial + (group_of(s) > SPAN ? most : 0);
        table_stride = with_tables && s.codec == BITCPM_1_6BIT && tokens <= TABLE_TOKENS ? TABLE * tables_of(s) : 0;
        bytes = tables + tokens * table_stride;
    }
};

inline bool valid(const bitcpm_shape &s) {
    return s.rows > 0 && s.columns > 0 && s.group > 0 && (s.codec == BITCPM_2BIT || s.codec == BITCPM_1_6BIT) &&
           s.scale_dtype >= BITCPM_FLOAT32 && s.scale_dtype <= BITCPM_FLOAT16;
}
inline bool aligned(const void *p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }

// Share ith of nth of [0, n): contiguous, sizes differ by at most one.
inline int64_t share(int64_t n, int32_t ith, int32_t nth) { return n * ith / nth; }

}  // namespace bitcpm
