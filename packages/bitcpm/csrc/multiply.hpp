// The products: few tokens straight from packed weights, many from digits that are unpacked once for all of them.
#pragma once
#include "planes.hpp"
#include "tables.hpp"
#include "unpack.hpp"

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
    const int64_t group, groups, columns, bytes;
    const Prepared at;

    const int8_t *values(int64_t t) const { return reinterpret_cast<const int8_t *>(a->prepared + at.values + t * at.value_stride); }
    const int32_t *sums(int64_t t) const { return reinterpret_cast<const int32_t *>(a->prepared + at.sums + t * at.group_stride); }
    const float *worth(int64_t t) const { return reinterpret_cast<const float *>(a->prepared + at.scales + t * at.group_stride); }
    int64_t size(int64_t g) const { return smaller(group, columns - g * group); }

    // Sixteen scales of a group, times what the token's int8 values are worth if that differs by group.
    F scale_of(const char *scale, int v, int64_t t, int64_t g) const {
        const F w = scales(scale + v * 16 * scale_bytes(s), s.scale_dtype);
        return a->mode == BITCPM_INT8_GROUP ? fmul(w, fset(worth(t)[g])) : w;
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
        : a(args), s(args->shape), group(group_of(s)), groups(groups_of(s)), columns(s.columns), bytes(block_bytes(s)),
          at(s, args->tokens, args->mode, BITCPM_VNNI) {}

    // ---- one token from packed weights
    void planes(int64_t block, int64_t t) const {
        const char *p = a->weights + block * bytes;
        const int8_t *x = values(t);
        F y[4] = {fzero(), fzero(), fzero(), fzero()};
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t n = size(g);
            const I start = set(-sums(t)[g]);
            I sum[4] = {start, start, start, start};
            multiply_planes(p, x, n, sum);
            p += code_bytes(BITCPM_2BIT, n), x += round_up(n, 16);
            for (int v = 0; v < 4; ++v) y[v] = fadd(y[v], fmul(to_float(sum[v]), scale_of(p, v, t, g)));
            p += BLOCK * scale_bytes(s);
        }
        for (int v = 0; v < 4; ++v) write(y[v], block * BLOCK + v * 16, t);
    }

#if BITCPM_VNNI
    template <int R> void tables(int64_t block, int64_t t) const {
        const char *p = a->weights + block * bytes;
        const char *table = a->prepared + at.tables + t * at.table_stride;
        F y[R][4];
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < 4; ++v) y[r][v] = fzero();
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t n = size(g);
            I sum[R][4];
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < 4; ++v) sum[r][v] = zero();
            for (int64_t done = 0; done < n; done += SPAN) {
                const int64_t some = smaller(SPAN, n - done), bytes_here = code_bytes(BITCPM_1_6BIT, some);
                look_up<R>(p, bytes, table, some, sum);
                p += bytes_here, table += bytes_here / 64 * TABLE;
            }
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < 4; ++v)
                    y[r][v] = fadd(y[r][v], fmul(to_float(sum[r][v]), scale_of(p + r * bytes, v, t, g)));
            p += BLOCK * scale_bytes(s);
        }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < 4; ++v) write(y[r][v], (block + r) * BLOCK + v * 16, t);
    }
#endif

    void vector(int64_t begin, int64_t end) const {
        int64_t block = begin;
#if BITCPM_VNNI
        if (s.codec == BITCPM_1_6BIT) {
            for (; block + 4 <= end; block += 4)
                for (int64_t t = 0; t < a->tokens; ++t) tables<4>(block, t);
            for (; block + 2 <= end; block += 2)
                for (int64_t t = 0; t < a->tokens; ++t) tables<2>(block, t);
            for (; block < end; ++block)
                for (int64_t t = 0; t < a->tokens; ++t) tables<1>(block, t);
        }
#endif
        for (; block < end; ++block)
            for (int64_t t = 0; t < a->tokens; ++t) planes(block, t);
    }

    // ---- many tokens from digits
    // N tokens from t on, rows of LANES sixteens from v on; y and partial are [token][64].
    template <int N>
    void whole(const char *digits, int64_t first, int64_t n, int64_t g, const char *scale, int64_t t, int v, float *y, int32_t *partial, bool begins, bool ends) const {
        I acc[LANES][N];
        const int8_t *x[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            x[i] = values(t + i) + first;
#pragma GCC unroll 4
            for (int j = 0; j < LANES; ++j)
                acc[j][i] = begins ? set(-sums(t + i)[g]) : load(partial + i * BLOCK + (v + j) * 16);
        }
        const char *d = digits + v * 64;
        for (int64_t c = 0; c < n; c += 4, d += 256) {
            I w[LANES];
#pragma GCC unroll 4
            for (int j = 0; j < LANES; ++j) w[j] = load(d + 64 * j);
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) {
                const I b = broadcast(x[i] + c);
#pragma GCC unroll 4
                for (int j = 0; j < LANES; ++j) acc[j][i] = dot(acc[j][i], w[j], b);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < LANES; ++j) {
                const int64_t here = i * BLOCK + (v + j) * 16;
                if (!ends) store(partial + here, acc[j][i]);
                else fstore(y + here, fadd(fload(y + here), fmul(to_float(acc[j][i]), scale_of(scale, v + j, t + i, g))));
            }
    }

    template <int N>
    void exact(const char *digits, int64_t first, int64_t n, int64_t g, const char *scale, int64_t t, int v, float *y, int32_t *, bool, bool) const {
        F acc[LANES][N];
        const float *x[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
            x[i] = reinterpret_cast<const float *>(values(t + i)) + first;
#pragma GCC unroll 4
            for (int j = 0; j < LANES; ++j) acc[j][i] = fzero();
        }
        const char *d = digits + v * 64;
        for (int64_t c = 0; c < n; c += 4, d += 256) {
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
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < LANES; ++j) {
                const int64_t here = i * BLOCK + (v + j) * 16;
                fstore(y + here, fadd(fload(y + here), fmul(acc[j][i], scale_of(scale, v + j, t + i, g))));
            }
    }

    // All tokens [t, end), N at a time and then fewer.
    template <int N, bool EXACT, class... Rest>
    void tile(int64_t &t, int64_t end, int64_t base, const char *digits, int64_t first, int64_t n, int64_t g, const char *scale, float *y, int32_t *partial, bool begins, bool ends) const {
        for (; t + N <= end; t += N)
            for (int v = 0; v < 4; v += LANES) {
                float *to = y + (t - base) * BLOCK;
                int32_t *sum = partial + (t - base) * BLOCK;
                if constexpr (EXACT) exact<N>(digits, first, n, g, scale, t, v, to, sum, begins, ends);
                else whole<N>(digits, first, n, g, scale, t, v, to, sum, begins, ends);
            }
        if constexpr (N > 1) tile<N - 1, EXACT>(t, end, base, digits, first, n, g, scale, y, partial, begins, ends);
    }

    void matrix(int64_t begin, int64_t end, char *work) const {
        const Work in(s, a->tokens, a->mode);
        char *digits = work + in.digits;
        float *y = reinterpret_cast<float *>(work + in.sums);
        int32_t *partial = reinterpret_cast<int32_t *>(work + in.partial);
        for (int64_t base = 0; base < a->tokens; base += MOST_TOKENS) {
            const int64_t stop = smaller(base + MOST_TOKENS, a->tokens);
            for (int64_t block = begin; block < end; ++block) {
                const char *p = a->weights + block * bytes;
                std::memset(y, 0, size_t((stop - base) * BLOCK * 4));
                for (int64_t g = 0; g < groups; ++g) {
                    const int64_t n = size(g);
                    const char *scale = p + code_bytes(s.codec, n);
                    for (int64_t done = 0; done < n; done += SPAN) {
                        const int64_t some = smaller(SPAN, n - done), first = g * round_up(group, 16) + done;
                        unpack(s.codec, p, some, digits);
                        p += code_bytes(s.codec, some);
                        int64_t t = base;
                        const bool begins = done == 0, ends = done + some == n;
                        if (a->mode == BITCPM_EXACT)
                            tile<EXACT_TOKENS, true>(t, stop, base, digits, first, some, g, scale, y, partial, begins, ends);
                        else
                            tile<WHOLE_TOKENS, false>(t, stop, base, digits, first, some, g, scale, y, partial, begins, ends);
                    }
                    p = scale + BLOCK * scale_bytes(s);
                }
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
    const int64_t blocks = blocks_of(a->shape), begin = share(blocks, ith, nth), end = share(blocks, ith + 1, nth);
    const bool packed = a->shape.codec == BITCPM_2BIT || BITCPM_VNNI;
    if (a->mode != BITCPM_EXACT && packed && a->tokens <= TABLE_TOKENS)
        multiplier.vector(begin, end);
    else
        multiplier.matrix(begin, end, a->work + ith * a->work_stride);
    return 0;
}

}  // namespace NATIVE_LEVEL
}  // namespace bitcpm
