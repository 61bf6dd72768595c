// The products: few tokens straight from packed weights, many from digits that are unpacked once for all of them.
#pragma once
#include "fives.hpp"
#include "planes.hpp"
#include "tables.hpp"
#include "tiles.hpp"

namespace bitcpm {
inline namespace NATIVE_LEVEL {

// Rows (in sixteens) and tokens whose sums are in registers together.
#if defined(__AVX512F__)
constexpr int LANES = 4, WHOLE_TOKENS = 6, EXACT_TOKENS = 4;
#elif defined(__AVX2__)
constexpr int LANES = 1, WHOLE_TOKENS = 4, EXACT_TOKENS = 4;
#else
constexpr int LANES = 1, WHOLE_TOKENS = 1, EXACT_TOKENS = 1;
#endif

class Multiplier {
    const bitcpm_multiply_args *a;
    const bitcpm_shape &s;
    const int64_t group, groups, columns;
    const Prepared at;

    const int8_t *values(int64_t t) const { return reinterpret_cast<const int8_t *>(a->prepared + at.values + t * at.value_stride); }
    const int32_t *sums(int64_t t) const { return reinterpret_cast<const int32_t *>(a->prepared + at.sums + t * at.group_stride); }
    const float *worth(int64_t t) const { return reinterpret_cast<const float *>(a->prepared + at.scales + t * at.group_stride); }
    int64_t size(int64_t g) const { return smaller(group, columns - g * group); }

    // Scales of sixteen rows; and times what the token's int8 values are worth, if that differs by group.
    F sixteen(const char *scale, int v) const { return scales(scale + v * 16 * scale_bytes(s), s.scale_dtype); }
    F times(F scale, int64_t t, int64_t g) const {
        return a->mode == BITCPM_INT8_GROUP ? fmul(scale, fset(worth(t)[g])) : scale;
    }

    // Sixteen finished sums of rows [row, row + 16), of which some may not exist.
    void write(F y, int64_t row, int64_t t) const {
        if (a->mode == BITCPM_INT8_TOKEN) y = fmul(y, fset(worth(t)[0]));
        const int64_t some = smaller(16, s.rows - row), to = t * a->out_stride + row;
        if (some == 16) {
            if (a->bias) y = fadd(y, fload(a->bias + row));
            if (a->out_dtype == BITCPM_FLOAT32) return fstore(static_cast<float *>(a->out) + to, y);
            if (a->out_dtype == BITCPM_BFLOAT16) return store_bf16(static_cast<uint16_t *>(a->out) + to, y);
        }
        float x[16];
        fstore(x, y);
        for (int64_t i = 0; i < some; ++i) {
            if (a->bias && some < 16) x[i] += a->bias[row + i];
            write_float(a->out, to + i, x[i], a->out_dtype);
        }
    }

  public:
    explicit Multiplier(const bitcpm_multiply_args *args)
        : a(args), s(args->shape), group(group_of(s)), groups(groups_of(s)), columns(s.columns),
          at(s, args->tokens, args->mode) {}

    static void collect(float *y, F x) { fstore(y, fadd(fload(y), x)); }

    // ---- one token from packed weights
    void planes(const char *p, int64_t block, int64_t t) const {
        const int8_t *x = values(t);
        F y[4] = {fzero(), fzero(), fzero(), fzero()};
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t n = size(g);
            const I start = set(-sums(t)[g]);
            I sum[4] = {start, start, start, start};
            multiply_planes(p, x, n, sum);
            p += code_bytes(BITCPM_2BIT, n), x += round_up(n, 16);
            for (int v = 0; v < 4; ++v) y[v] = fadd(y[v], fmul(to_float(sum[v]), times(sixteen(p, v), t, g)));
            p += BLOCK * scale_bytes(s);
        }
        for (int v = 0; v < 4; ++v) write(y[v], block * BLOCK + v * 16, t);
    }

#if BITCPM_FIVES
    // Strip by strip, span by span: its blocks' codes lie between each other.
    void fives(int64_t strip) const {
        const int64_t first = strip * strip_of(s), count = smaller(strip_of(s), blocks_of(s) - first);
        F y[MOST_STRIP][4];
        I sum[MOST_STRIP][4];
        for (auto &sixteens : y) for (F &each : sixteens) each = fzero();
        const char *p = a->weights + Place(s, first).start;
        each_part(s, [&](const Part &part) {
            for (int64_t r = 0; r < count; ++r) {
                const Place place(s, first + r);
                if (part.begins) for (I &each : sum[r]) each = set(-sums(0)[part.group]);
                multiply_fives(p + place.codes(part), place.strip_blocks, values(0) + part.first, part.columns, sum[r]);
                const char *scale = p + place.scales(part, s);
                if (part.ends) for (int v = 0; v < 4; ++v) y[r][v] = fadd(y[r][v], fmul(to_float(sum[r][v]), times(sixteen(scale, v), 0, part.group)));
            }
            p += Place(s, first).panel_blocks * part.unit;
        });
        for (int64_t r = 0; r < count; ++r) for (int v = 0; v < 4; ++v) write(y[r][v], (first + r) * BLOCK + v * 16, 0);
    }
#endif

#if BITCPM_VNNI
    // One span of a strip of R blocks for one token; y and partial are what its rows have so far.
    template <int R>
    void tables(const char *codes, const Part &part, const char *table, int64_t t, float *y, int32_t *partial) const {
        I sum[R][4];
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < 4; ++v) sum[r][v] = part.begins ? zero() : load(partial + r * BLOCK + v * 16);
        look_up<R>(codes, table, part.columns, sum);
        const char *scale = codes + R * part.codes;
        for (int r = 0; r < R; ++r, scale += BLOCK * scale_bytes(s))
            for (int v = 0; v < 4; ++v) {
                const int64_t here = r * BLOCK + v * 16;
                if (!part.ends) store(partial + here, sum[r][v]);
                else collect(y + here, fmul(to_float(sum[r][v]), times(sixteen(scale, v), t, part.group)));
            }
    }

    // Strips [begin, end) of one panel. Tables are made on the way where they are not there yet.
    void strips(int64_t begin, int64_t end, char *work, bool made) const {
        constexpr int64_t ROWS = MOST_PANEL * BLOCK;
        alignas(64) float y[TABLE_TOKENS * ROWS];
        alignas(64) int32_t partial[TABLE_TOKENS * ROWS];
        std::memset(y, 0, size_t(a->tokens * ROWS * 4));
        const int64_t width = strip_of(s), first = begin * width, last = smaller(end * width, blocks_of(s));
        const Work in(s, a->tokens, true);
        const TableMaker maker;
        const char *p = a->weights + Place(s, first).start;
        char *table = work + in.tables;
        each_part(s, [&](const Part &part) {
            if (!made)
                for (int64_t t = 0; t < a->tokens; ++t) maker.make(values(t) + part.first, part.columns, table + t * in.table_stride);
            for (int64_t block = first; block < last; block += width) {
                const Place place(s, block);
                const char *codes = p + place.codes(part);
                for (int64_t t = 0; t < a->tokens; ++t) {
                    const int64_t row = t * ROWS + (block - first) * BLOCK;
                    const char *mine = table + t * in.table_stride;
                    if (place.strip_blocks == 4) tables<4>(codes, part, mine, t, y + row, partial + row);
                    else if (place.strip_blocks == 3) tables<3>(codes, part, mine, t, y + row, partial + row);
                    else if (place.strip_blocks == 2) tables<2>(codes, part, mine, t, y + row, partial + row);
                    else tables<1>(codes, part, mine, t, y + row, partial + row);
                }
            }
            p += Place(s, first).panel_blocks * part.unit;
            table += div_up(part.columns, 5) * TABLE;
        });
        for (int64_t t = 0; t < a->tokens; ++t)
            for (int64_t row = 0; row < (last - first) * BLOCK; row += 16) write(fload(y + t * ROWS + row), first * BLOCK + row, t);
    }
#endif

    // Strips [begin, end).
    void vector(int64_t begin, int64_t end, char *work) const {
        if (s.codec == BITCPM_2BIT) {
            for (int64_t block = begin; block < end; ++block)
                for (int64_t t = 0; t < a->tokens; ++t) planes(a->weights + Place(s, block).start, block, t);
            return;
        }
#if BITCPM_FIVES
        for (int64_t strip = begin; strip < end; ++strip) fives(strip);
#elif BITCPM_VNNI
        const int64_t width = strip_of(s), most = panel_of(s) / width;
        // Too few rows to make tables for.
        if ((end - begin) * width <= a->tokens) return matrix(begin * width, smaller(end * width, blocks_of(s)), work);
        for (int64_t first = begin; first < end;) {
            const int64_t stop = smaller(end, first - first % most + most);
            strips(first, stop, work, first != begin);
            first = stop;
        }
#endif
    }

    // ---- many tokens from digits
    // N tokens from t on, rows of LANES sixteens from v on; y and partial are [token][64]. Not inlined: GCC then keeps the
    // sums in registers, and otherwise spills them in the innermost loop (half the speed).
    template <int N>
    __attribute__((noinline)) void whole(const char *digits, const Part &part, const char *scale, int64_t t, int v, float *y, int32_t *partial) const {
        I acc[LANES][N];
        const int8_t *x[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            x[i] = values(t + i) + part.first;
#pragma GCC unroll 4
            for (int j = 0; j < LANES; ++j)
                acc[j][i] = part.begins ? set(-sums(t + i)[part.group]) : load(partial + i * BLOCK + (v + j) * 16);
        }
        // The next tokens' columns: no hardware foresees them.
        const int64_t next = t + 2 * N <= a->tokens ? N * at.value_stride : 0;
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i)
            for (int64_t c = 0; c < part.columns; c += 64) __builtin_prefetch(x[i] + next + c);
        const char *d = digits + v * 64;
        for (int64_t c = 0; c < part.columns;) {
            I some[LANES][N];
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < LANES; ++j) some[j][i] = begin_words(acc[j][i]);
            for (const int64_t stop = smaller(part.columns, c + WORD_COLUMNS); c < stop; c += 4, d += 256) {
                I w[LANES];
#pragma GCC unroll 4
                for (int j = 0; j < LANES; ++j) w[j] = load(d + 64 * j);
#pragma GCC unroll 8
                for (int i = 0; i < N; ++i) {
                    const I b = broadcast(x[i] + c);
#pragma GCC unroll 4
                    for (int j = 0; j < LANES; ++j) some[j][i] = dot_words(some[j][i], w[j], b);
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < LANES; ++j) acc[j][i] = end_words(acc[j][i], some[j][i]);
        }
        if (!part.ends) {
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < LANES; ++j) store(partial + i * BLOCK + (v + j) * 16, acc[j][i]);
            return;
        }
        F weight[LANES];
#pragma GCC unroll 4
        for (int j = 0; j < LANES; ++j) weight[j] = sixteen(scale, v + j);
        if (a->mode == BITCPM_INT8_TOKEN) {
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < LANES; ++j) collect(y + i * BLOCK + (v + j) * 16, fmul(to_float(acc[j][i]), weight[j]));
            return;
        }
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            const F worth_here = fset(worth(t + i)[part.group]);
#pragma GCC unroll 4
            for (int j = 0; j < LANES; ++j)
                collect(y + i * BLOCK + (v + j) * 16, fmul(to_float(acc[j][i]), fmul(weight[j], worth_here)));
        }
    }

    // Spans whose digits are unpacked and wait for all tokens to pass by.
    struct Waiting {
        Part part;
        const char *digits, *scale;
    };

#if defined(__AVX512F__)
    // N tokens from t on and rows of two sixteens from v on through all spans that wait: integer sums and floats both stay
    // in registers, and the end of a group overlaps with the next one's products.
    template <int N>
    __attribute__((noinline)) void through(const Waiting *spans, int64_t count, int64_t t, int v, float *y, int32_t *partial) const {
        I acc[2][N];
        F total[2][N];
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                total[j][i] = fload(y + i * BLOCK + (v + j) * 16);
                if (!spans->part.begins) acc[j][i] = load(partial + i * BLOCK + (v + j) * 16);
            }
        for (const Waiting *span = spans; span < spans + count; ++span) {
            const Part &part = span->part;
            if (part.begins)
#pragma GCC unroll 8
                for (int i = 0; i < N; ++i) acc[0][i] = acc[1][i] = set(-sums(t + i)[part.group]);
            const int8_t *x = values(t) + part.first;
            const char *d = span->digits + v * 64;
            for (int64_t c = 0; c < part.columns; c += 4, d += 256, x += 4) {
                const I w0 = load(d), w1 = load(d + 64);
#pragma GCC unroll 8
                for (int i = 0; i < N; ++i) {
                    const I b = broadcast(x + i * at.value_stride);
                    acc[0][i] = dot(acc[0][i], w0, b), acc[1][i] = dot(acc[1][i], w1, b);
                }
            }
            if (!part.ends) continue;
            const F weight[2] = {sixteen(span->scale, v), sixteen(span->scale, v + 1)};
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
                for (int j = 0; j < 2; ++j) total[j][i] = fadd(total[j][i], fmul(to_float(acc[j][i]), times(weight[j], t + i, part.group)));
        }
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                fstore(y + i * BLOCK + (v + j) * 16, total[j][i]);
                if (!spans[count - 1].part.ends) store(partial + i * BLOCK + (v + j) * 16, acc[j][i]);
            }
    }

    // Tokens from t on, N at a time; the fewer that are left are not done.
    template <int N>
    void pass(int64_t &t, int64_t end, int64_t base, const Waiting *spans, int64_t count, float *y, int32_t *partial) const {
        for (; t + N <= end; t += N)
            for (int v = 0; v < 4; v += 2) through<N>(spans, count, t, v, y + (t - base) * BLOCK, partial + (t - base) * BLOCK);
    }
#endif

    template <int N>
    __attribute__((noinline)) void exact(const char *digits, const Part &part, const char *scale, int64_t t, int v, float *y, float *partial) const {
        F acc[LANES][N];
        const float *x[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            x[i] = reinterpret_cast<const float *>(values(t + i)) + part.first;
#pragma GCC unroll 4
            for (int j = 0; j < LANES; ++j) acc[j][i] = fzero();
        }
        const char *d = digits + v * 64;
        for (int64_t c = 0; c < part.columns; c += 4, d += 256) {
            I w[LANES];
#pragma GCC unroll 4
            for (int j = 0; j < LANES; ++j) w[j] = load(d + 64 * j);
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) {
                F level[LANES];
#pragma GCC unroll 4
                for (int j = 0; j < LANES; ++j) level[j] = level_of(w[j]), w[j] = shift_right<8>(w[j]);
#pragma GCC unroll 8
                for (int i = 0; i < N; ++i) {
                    const F b = fset(x[i][c + k]);
#pragma GCC unroll 4
                    for (int j = 0; j < LANES; ++j) acc[j][i] = accumulate(acc[j][i], level[j], b);
                }
            }
        }
        F weight[LANES];
        const bool begins = part.begins, ends = part.ends;
        if (ends)
#pragma GCC unroll 4
            for (int j = 0; j < LANES; ++j) weight[j] = sixteen(scale, v + j);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < LANES; ++j) {
                const int64_t here = i * BLOCK + (v + j) * 16;
                if (!begins) acc[j][i] = fadd(fload(partial + here), acc[j][i]);
                if (ends) collect(y + here, fmul(acc[j][i], weight[j]));
                else fstore(partial + here, acc[j][i]);
            }
    }

    // All tokens [t, end), N at a time and then fewer.
    template <int N, bool EXACT>
    void tile(int64_t &t, int64_t end, int64_t base, const char *digits, const Part &part, const char *scale, float *y, int32_t *partial) const {
        for (; t + N <= end; t += N)
            for (int v = 0; v < 4; v += LANES) {
                float *to = y + (t - base) * BLOCK;
                int32_t *some = partial + (t - base) * BLOCK;
                if constexpr (EXACT) exact<N>(digits, part, scale, t, v, to, reinterpret_cast<float *>(some));
                else whole<N>(digits, part, scale, t, v, to, some);
            }
        if constexpr (N > 1) tile<N - 1, EXACT>(t, end, base, digits, part, scale, y, partial);
    }

#if BITCPM_TILES
    // Tokens from t on by 32 and by 16, through `count` spans; the fewer that are left are not done.
    void tiled(int64_t &t, int64_t end, int64_t base, const Waiting *spans, int64_t count, float *y, int32_t *partial) const {
        alignas(64) int32_t finished[2 * TILE_TOKENS * BLOCK];
        while (t + TILE_TOKENS <= end) {
            const bool two = t + 2 * TILE_TOKENS <= end;
            const int64_t some = two ? 2 * TILE_TOKENS : TILE_TOKENS;
            int32_t *unfinished = partial + (t - base) * BLOCK;
            for (int64_t i = 0; i < count; ++i) {
                const Part &part = spans[i].part;
                int32_t *sums = part.ends ? finished : unfinished;
                const int8_t *x = values(t) + part.first;
                const int32_t *before = part.begins ? nullptr : unfinished;
                for (int v = 0; v < 4; v += 2)
                    two ? tile_products<true>(x, at.value_stride, spans[i].digits, part.columns, v, before, sums)
                        : tile_products<false>(x, at.value_stride, spans[i].digits, part.columns, v, before, sums);
                if (part.ends) finish(part.group, spans[i].scale, t, some, finished, y + (t - base) * BLOCK);
            }
            t += some;
        }
    }

    // A group's sums [count][64], with what its digits are too large by taken off, times scales, on top of y.
    void finish(int64_t g, const char *scale, int64_t t, int64_t count, const int32_t *sums, float *y) const {
        F weight[4];
        for (int v = 0; v < 4; ++v) weight[v] = sixteen(scale, v);
        for (int64_t i = 0; i < count; ++i, sums += BLOCK, y += BLOCK) {
            const I start = set(-this->sums(t + i)[g]);
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) collect(y + v * 16, fmul(to_float(add(load(sums + v * 16), start)), times(weight[v], t + i, g)));
        }
    }
#endif

    void matrix(int64_t begin, int64_t end, char *work) const {
        const Work in(s, a->tokens, BITCPM_VNNI);
#if BITCPM_TILES
        const native::Tiles configured;
#endif
        char *digits = work + in.digits;
        float *y = reinterpret_cast<float *>(work + in.sums);
        int32_t *partial = reinterpret_cast<int32_t *>(work + in.partial);
        for (int64_t base = 0; base < a->tokens; base += MOST_TOKENS) {
            const int64_t stop = smaller(base + MOST_TOKENS, a->tokens);
            for (int64_t block = begin; block < end; ++block) {
                const Place place(s, block);
                const char *p = a->weights + place.start;
                std::memset(y, 0, size_t((stop - base) * BLOCK * 4));
#if defined(__AVX512F__)
                if (a->mode != BITCPM_EXACT) {
                    Waiting spans[MOST_WAITING];
                    int64_t count = 0, used = 0;
                    each_part(s, [&](const Part &part) {
                        unpack(s.codec, p + place.codes(part), place.strip_blocks, part.columns, digits + used);
#if BITCPM_TILES
                        fill_up(digits + used, part.columns);
#endif
                        spans[count++] = {part, digits + used, p + place.scales(part, s)};
                        used += round_up(part.columns, TILE_COLUMNS) * BLOCK;
                        p += place.panel_blocks * part.unit;
                        if (count < MOST_WAITING && used < BLOCK * DIGIT_COLUMNS && part.column + part.columns < columns) return;
                        int64_t t = base;
#if BITCPM_TILES
                        tiled(t, stop, base, spans, count, y, partial);
#else
                        pass<6>(t, stop, base, spans, count, y, partial);
#endif
                        for (int64_t i = 0, first = t; i < count; ++i, t = first)
                            tile<WHOLE_TOKENS, false>(t, stop, base, spans[i].digits, spans[i].part, spans[i].scale, y, partial);
                        count = used = 0;
                    });
                } else
#endif
                    each_part(s, [&](const Part &part) {
                        unpack(s.codec, p + place.codes(part), place.strip_blocks, part.columns, digits);
                        const char *scale = p + place.scales(part, s);
                        int64_t t = base;
                        if (a->mode == BITCPM_EXACT)
                            tile<EXACT_TOKENS, true>(t, stop, base, digits, part, scale, y, partial);
                        else
                            tile<WHOLE_TOKENS, false>(t, stop, base, digits, part, scale, y, partial);
                        p += place.panel_blocks * part.unit;
                    });
                for (int64_t t = base; t < stop; ++t)
                    for (int v = 0; v < 4; ++v) write(fload(y + (t - base) * BLOCK + v * 16), block * BLOCK + v * 16, t);
            }
        }
    }
};

inline int32_t multiply(const bitcpm_multiply_args *a, int32_t ith, int32_t nth) {
    if (!valid(a->shape) || a->tokens < 0 || a->mode < 0 || a->mode > BITCPM_EXACT || a->out_dtype < 0 || a->out_dtype > BITCPM_FLOAT16) return 1;
    if (!aligned(a->weights) || !aligned(a->prepared) || !aligned(a->work) || a->work_stride % 64) return 2;
    const Multiplier multiplier(a);
    char *work = a->work + ith * a->work_stride;
    const bool packed = a->shape.codec == BITCPM_2BIT || BITCPM_VNNI || (BITCPM_FIVES && a->tokens == 1);
    if (a->mode != BITCPM_EXACT && packed && a->tokens <= TABLE_TOKENS) {
        const int64_t strips = strips_of(a->shape);
        multiplier.vector(share(strips, ith, nth), share(strips, ith + 1, nth), work);
    } else {
        const int64_t blocks = blocks_of(a->shape);
        multiplier.matrix(share(blocks, ith, nth), share(blocks, ith + 1, nth), work);
    }
    return 0;
}

}  // namespace NATIVE_LEVEL
}  // namespace bitcpm
