// Products of packed rows with packed weights: matrix-vector for one token, matrix-matrix for more, from one kernel, so
// that a token's result does not depend on how many others came with it; but where the processor has matrix tiles, many
// tokens are multiplied by those (tiles.hpp).
//
// Integers: weights are unsigned bytes u with a zero point w0, activations signed ones q with one of their own, a0. A
// group's sum (u - w0) (q - a0) is exact in 32 bits: products of the codes, from w0 times the sum of q - a0 downwards, less
// a0 times the sum of u. It is then scaled by the product of both factors. Sums of weights are made as they pass by, once
// for all tokens: storing them would be 6 to 12 % more to read.
#pragma once
#include "args.h"
#include "group_sums.hpp"
#include "tiles.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

inline int64_t panels_of(const cpmcu_matrix &m) { return (m.rows + ROWS - 1) / ROWS; }
inline int64_t panel_bytes(const cpmcu_matrix &m) {
    const int64_t per_16[] = {64 * ROWS, 32 * ROWS, 16 * ROWS, 8 * ROWS};
    return m.cols * per_16[m.kind] / 16;
}
inline int64_t bytes_of_rows(int32_t kind, int64_t cols) { return kind == CPMCU_FLOAT32 ? 4 * cols : kind == CPMCU_BFLOAT16 ? 2 * cols : cols; }
// Bytes a thread: two panels of integers in bfloat16; or as bytes, and the sums of their groups.
inline int64_t multiply_work(const cpmcu_matrix &m) { return (m.kind >= CPMCU_INT8 ? 4 * ROWS * m.cols : 0) + 128; }

// 4-bit weights as bytes [cols / 4][16][4], their zero point still 8.
inline void widen_panel(const uint8_t *from, int64_t cols, uint8_t *to) {
    for (int64_t i = 0; i < cols / 8; ++i, from += 64, to += 128)
        for (int j = 0; j < 64; ++j) to[j] = from[j] & 15, to[64 + j] = from[j] >> 4;
}

// Bytes of weights that a single token's product asks memory for before it needs them: processors foresee a stream, but
// stop at every page of 4 KB.
constexpr ptrdiff_t FAR_AHEAD = 2048;

// As many products as registers hold: of so many tokens, and panels.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int TOKENS_AT_ONCE = 4, PANELS_AT_ONCE = 1;
#else
constexpr int TOKENS_AT_ONCE = 6, PANELS_AT_ONCE = 2;
#endif

// What follows makes `out` [R][N][16] for N tokens of a block of W and R panels, whose weights lie `apart` bytes from each
// other. Several panels share the broadcasts, several tokens the loads of weights.

// Rows [groups][N] of what belongs to groups of activations, W apart.
struct Groups {
    const float *scales;
    const int32_t *offsets, *zeros;
    int64_t count;
    int size;
};

// sums [groups][16] of a panel of bytes.
inline void sum_panel(const uint8_t *w, int64_t groups, int group, int32_t *sums) {
    using P = Panel;
    for (int64_t g = 0; g < groups; ++g, sums += ROWS) {
        auto sum = P::none();
        for (int k = 0; k < group; k += 4, w += 64) sum = P::dot(sum, P::bytes(w), P::ones());
        P::store_words(sums, sum);
    }
}

// The products of a group's weights at w, which moves on, as does a. For a single token the sums of weights are made too.
template <int N, int W, int R, Weights KIND>
inline void group_products(const uint8_t *&w, ptrdiff_t apart, const int8_t *&a, int size, Panel::I (&acc)[R][N], Panel::I &sum) {
    using P = Panel;
#if defined(__AVX2__) && !defined(__AVX512F__)
    static_assert(R == 1, "there are registers for one panel");
    const int64_t bytes = int64_t(size) * (KIND == NIBBLES ? ROWS / 2 : ROWS);
    if constexpr (KIND == BYTES)
        GroupSums::bytes<N, W>(w, a, size, FAR_AHEAD, acc[0], &sum);
    else
        for (int k = 0; k < size; k += 32) {
            const uint8_t *from = w + bytes / size * k;
            if constexpr (KIND == NIBBLES)
                GroupSums::nibbles(from, a + k * W, FAR_AHEAD, acc[0], &sum);
            else
                GroupSums::small<N, W>(from, a + k * W, acc[0]);
        }
    w += bytes, a += size * W;
#else
    for (int k = 0; k < size; k += KIND == NIBBLES ? 8 : 4, w += 64) {
        if (N == 1) __builtin_prefetch(w + FAR_AHEAD);
        typename P::I bytes[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) bytes[r] = P::bytes(w + r * apart);
        if (N == 1) sum = P::dot(sum, KIND == NIBBLES ? P::add(P::low(bytes[0]), P::high(bytes[0])) : bytes[0], P::ones());
#pragma GCC unroll 2
        for (int half = 0; half < (KIND == NIBBLES ? 2 : 1); ++half, a += W * 4)
#pragma GCC unroll 12
            for (int t = 0; t < N; ++t) {
                const auto four = P::unit(a + t * 4);
#pragma GCC unroll 2
                for (int r = 0; r < R; ++r) acc[r][t] = P::dot(acc[r][t], KIND != NIBBLES ? bytes[r] : half ? P::high(bytes[r]) : P::low(bytes[r]), four);
            }
    }
#endif
}

// Scales of the panels lie `scales_apart` from each other, and so do the
// sums of their groups, which for a single token are made here, and shifts. A shift is multiplied by the sum of the
// activations: that is a start without minus the zero point of weights, which is 8 where they have shifts.
template <int N, int W, int R, Weights KIND>
inline void integer_panels(const uint8_t *w, ptrdiff_t apart, const uint16_t *scales, const uint16_t *shifts, const int32_t *sums,
                           ptrdiff_t scales_apart, const int8_t *a, Groups of, float *out) {
    using P = Panel;
    typename P::F total[R][N];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
        for (int t = 0; t < N; ++t) total[r][t] = P::zero();
    for (int64_t g = 0; g < of.count; ++g) {
        typename P::I acc[R][N], sum = P::none();
#pragma GCC unroll 12
        for (int t = 0; t < N; ++t) {
            const auto start = P::unit(of.offsets + g * W + t);
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r) acc[r][t] = start;
        }
        group_products<N, W, R, KIND>(w, apart, a, of.size, acc, sum);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
            if (N > 1) sum = P::bytes(sums + r * scales_apart + g * ROWS);
#pragma GCC unroll 12
            for (int t = 0; t < N; ++t) acc[r][t] = P::product(acc[r][t], sum, P::unit(of.zeros + g * W + t));
            const auto scale = P::halves(scales + r * scales_apart + g * ROWS);
            if (shifts) {
                const auto shift = P::mul(P::halves(shifts + r * scales_apart + g * ROWS), P::set(-1.f / 8));
#pragma GCC unroll 12
                for (int t = 0; t < N; ++t) {
                    const auto start = P::to_float(P::unit(of.offsets + g * W + t));
                    total[r][t] = P::fma(P::fma(P::to_float(acc[r][t]), scale, P::mul(start, shift)), P::set(of.scales[g * W + t]), total[r][t]);
                }
                continue;
            }
#pragma GCC unroll 12
            for (int t = 0; t < N; ++t) total[r][t] = P::fma(P::to_float(acc[r][t]), P::mul(scale, P::set(of.scales[g * W + t])), total[r][t]);
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
        for (int t = 0; t < N; ++t) P::store(out + (r * N + t) * ROWS, total[r][t]);
}

template <int N, int W, int R> inline void pair_panels(const uint8_t *w, ptrdiff_t apart, const char *a, int64_t cols, float *out) {
    using P = Panel;
    typename P::F acc[R][N];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
        for (int t = 0; t < N; ++t) acc[r][t] = P::zero();
    for (int64_t k = 0; k < cols; k += 2, w += 64, a += W * 4) {
        if (N == 1) __builtin_prefetch(w + FAR_AHEAD);
        typename P::I weights[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) weights[r] = P::bytes(w + r * apart);
#pragma GCC unroll 12
        for (int t = 0; t < N; ++t) {
            const auto two = P::unit(a + t * 4);
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r) acc[r][t] = P::pairs(acc[r][t], weights[r], two);
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
        for (int t = 0; t < N; ++t) P::store(out + (r * N + t) * ROWS, acc[r][t]);
}

// Sums of 64 columns at a time: the error of one long sum would grow with its length.
template <int N, int W, int R> inline void float_panels(const float *w, ptrdiff_t apart, const float *a, int64_t cols, float *out) {
    using P = Panel;
    for (int64_t begin = 0; begin < cols; begin += 64) {
        typename P::F acc[R][N];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
            for (int t = 0; t < N; ++t) acc[r][t] = P::zero();
        for (int64_t k = begin; k < cols && k < begin + 64; ++k, w += ROWS, a += W) {
            typename P::F weights[R];
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r) weights[r] = P::load(w + r * apart);
#pragma GCC unroll 12
            for (int t = 0; t < N; ++t) {
                const auto one = P::set(a[t]);
#pragma GCC unroll 2
                for (int r = 0; r < R; ++r) acc[r][t] = P::fma(weights[r], one, acc[r][t]);
            }
        }
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
            for (int t = 0; t < N; ++t) {
                float *total = out + (r * N + t) * ROWS;
                P::store(total, begin ? P::fma(acc[r][t], P::set(1.f), P::load(total)) : acc[r][t]);
            }
    }
}

struct Product {
    const cpmcu_multiply_args &a;
    const cpmcu_matrix &m;
    int64_t tokens;
    char *work;

    // `count` of N tokens from `token` on, for R panels from p on, whose weights lie at `w`.
    template <int N, int W, int R, Weights KIND> void part(int64_t p, const uint8_t *w, int64_t token, int count) const {
        alignas(64) float out[R * N * ROWS];
        for (int t = 0; t < count; ++t)  // far apart, each on a page of its own
            for (int r = 0; r < R; ++r) __builtin_prefetch(a.out + (token + t) * m.rows + (p + r) * ROWS, 1);
        const int64_t block = token / TOKENS * TOKENS, t0 = token - block, apart = panel_bytes(m);
        const char *rows = static_cast<const char *>(a.from.data) + block * bytes_of_rows(m.kind, m.cols) + t0 * 4;
        if (m.kind == CPMCU_FLOAT32) {
            float_panels<N, W, R>(reinterpret_cast<const float *>(w), apart / 4, reinterpret_cast<const float *>(rows), m.cols, out);
        } else if (m.kind == CPMCU_BFLOAT16) {
            pair_panels<N, W, R>(w, apart, rows, m.cols, out);
        } else {
            const int64_t groups = m.cols / m.group, at = block * groups + t0;
            const Groups of{a.from.scales + at, a.from.offsets + at, a.from.zeros + at, groups, m.group};
            integer_panels<N, W, R, KIND>(w, KIND == NIBBLES ? apart : ROWS * m.cols, m.scales + p * groups * ROWS,
                                             m.shifts ? m.shifts + p * groups * ROWS : nullptr, sums_of_panels(), groups * ROWS,
                                             reinterpret_cast<const int8_t *>(rows), of, out);
        }
        for (int r = 0; r < R; ++r) finish(p + r, token, count, out + r * N * ROWS);
    }

    // Products [count][16] of panel p go where they belong, with what is added to them, or `onto` what is there already.
    void finish(int64_t p, int64_t token, int64_t count, const float *from, bool onto = false) const {
        onto |= a.add;
        const int64_t row = p * ROWS, here = m.rows - row < ROWS ? m.rows - row : ROWS;
        const auto alpha = Panel::set(a.alpha), bias = a.bias && here == ROWS ? Panel::load(a.bias + row) : Panel::zero();
        for (int64_t t = 0; t < count; ++t, from += ROWS) {
            float *to = a.out + (token + t) * m.rows + row;
            if (here == ROWS)
                Panel::store(to, Panel::fma(Panel::load(from), alpha, onto ? Panel::load(to) : bias));
            else
                for (int i = 0; i < here; ++i) to[i] = a.alpha * from[i] + (onto ? to[i] : a.bias ? a.bias[row + i] : 0.f);
        }
    }

    uint8_t *aligned_work() const { return reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(work) + 63) & ~uintptr_t(63)); }

    // Behind two panels of bytes.
    int32_t *sums_of_panels() const { return reinterpret_cast<int32_t *>(aligned_work() + 2 * ROWS * m.cols); }

    // One token: panel after panel, so that weights are read as they lie.
    void vector(int64_t begin, int64_t end) const {
        const uint8_t *w = static_cast<const uint8_t *>(m.data);
        for (int64_t p = begin; p < end; ++p)
            m.kind == CPMCU_INT4 ? part<1, 1, 1, NIBBLES>(p, w + p * panel_bytes(m), 0, 1) : part<1, 1, 1, BYTES>(p, w + p * panel_bytes(m), 0, 1);
    }

    template <int R> void panels(int64_t p, int64_t begin, int64_t end) const {
        const uint8_t *w = static_cast<const uint8_t *>(m.data) + p * panel_bytes(m);
        if (m.kind == CPMCU_INT4) {
            uint8_t *wide = aligned_work();
            for (int r = 0; r < R; ++r) widen_panel(w + r * panel_bytes(m), m.cols, wide + r * ROWS * m.cols);
            w = wide;
        }
        if (m.kind >= CPMCU_INT8) {
            const int64_t groups = m.cols / m.group;
            for (int r = 0; r < R; ++r) sum_panel(w + r * ROWS * m.cols, groups, m.group, sums_of_panels() + r * groups * ROWS);
        }
        m.kind == CPMCU_INT4 ? tokens_of<R, SMALL_BYTES>(p, w, begin, end) : tokens_of<R, BYTES>(p, w, begin, end);
    }

    template <int R, Weights KIND> void tokens_of(int64_t p, const uint8_t *w, int64_t begin, int64_t end) const {
        constexpr int N = TOKENS_AT_ONCE;
        for (int64_t t = begin; t < end; t += N) {
            const int64_t left = tokens - t;
            left > N / 2 ? part<N, TOKENS, R, KIND>(p, w, t, int(left < N ? left : N)) : part<N / 2, TOKENS, R, KIND>(p, w, t, int(left));
        }
    }

#if defined(__AMX_TILE__)
    // Columns from k on of panel p, and of another one if there are two, in bfloat16; `second`: how many numbers after the
    // first the other is.
    const uint16_t *tile_weights(int64_t p, int64_t other, int panels, int64_t k, int64_t count, ptrdiff_t *second) const {
        const uint8_t *data = static_cast<const uint8_t *>(m.data) + panel_bytes(m) / m.cols * k;
        if (m.kind == CPMCU_BFLOAT16) {
            *second = (other - p) * panel_bytes(m) / 2;
            return reinterpret_cast<const uint16_t *>(data + p * panel_bytes(m));
        }
        uint16_t *wide = reinterpret_cast<uint16_t *>(aligned_work());
        *second = ROWS * count;
        for (int r = 0; r < panels; ++r) {
            const int64_t panel = r ? other : p;
            const uint8_t *from = data + panel * panel_bytes(m);
            const int64_t group = (panel * (m.cols / m.group) + k / m.group) * ROWS;
            const uint16_t *scales = m.scales + group, *shifts = m.shifts ? m.shifts + group : nullptr;
            m.kind == CPMCU_INT4 ? widen_to_pairs<4>(from, scales, shifts, count, m.group, wide + r * *second)
                                 : widen_to_pairs<8>(from, scales, shifts, count, m.group, wide + r * *second);
        }
        return wide;
    }

    // f(token, tokens, products [R][32][16]) for all tokens, at most `count` columns from k on, and panel p, and another one
    // if R is 2.
    template <int R, class F> void tiles(int64_t p, int64_t other, int64_t k, int64_t count, F f) const {
        count = m.cols - k < count ? m.cols - k : count;
        ptrdiff_t second;
        const uint16_t *w = tile_weights(p, other, R, k, count, &second);
        for (int64_t t = 0; t < tokens; t += 2 * TILE_TOKENS) {
            alignas(64) float out[2 * R * TILE_TOKENS * ROWS];
            const uint16_t *rows = static_cast<const uint16_t *>(a.from.data) + t * m.cols + k * TILE_TOKENS;
            const int64_t left = tokens - t;
            left > TILE_TOKENS ? tile_products<true, R>(rows, m.cols, w, second, count, out) : tile_products<false, R>(rows, m.cols, w, second, count, out);
            f(t, left < 2 * TILE_TOKENS ? left : 2 * TILE_TOKENS, out);
        }
    }

    void in_tiles(int64_t begin, int64_t end) const {
        const Tiles configured;
        for (int64_t k = 0; k < m.cols; k += MOST_SUMMED) {
            int64_t p = begin;
            for (; p + 2 <= end; p += 2)
                tiles<2>(p, p + 1, k, MOST_SUMMED, [&](int64_t token, int64_t count, const float *out) {
                    for (int r = 0; r < 2; ++r) finish(p + r, token, count, out + r * 2 * TILE_TOKENS * ROWS, k > 0);
                });
            for (; p < end; ++p) tiles<1>(p, p, k, MOST_SUMMED, [&](int64_t token, int64_t count, const float *out) { finish(p, token, count, out, k > 0); });
        }
    }

    // Gates and what they let through side by side: panels [begin, end) of either half. Sums of the first columns wait in a.out.
    void gated_in_tiles(int64_t begin, int64_t end) const {
        const Tiles configured;
        const int64_t cols = a.gated.cols, half = cols / ROWS;
        for (int64_t k = 0; k < m.cols; k += MOST_GATED)
            for (int64_t p = begin; p < end; ++p)
                tiles<2>(p, p + half, k, MOST_GATED, [&](int64_t token, int64_t count, const float *out) {
                    const float *gate = out, *up = out + 2 * TILE_TOKENS * ROWS;
                    if (k + MOST_GATED < m.cols) return finish(p, token, count, gate, k > 0), finish(p + half, token, count, up, k > 0);
                    alignas(64) float y[3][ROWS];
                    for (int64_t t = 0; t < count; ++t, gate += ROWS, up += ROWS) {
                        const float *before = a.out + (token + t) * m.rows + p * ROWS;
                        Panel::store(y[0], k ? Panel::fma(Panel::load(gate), Panel::set(1.f), Panel::load(before)) : Panel::load(gate));
                        Panel::store(y[1], k ? Panel::fma(Panel::load(up), Panel::set(1.f), Panel::load(before + cols)) : Panel::load(up));
                        gated(y[0], y[1], ROWS, y[2]);
                        place_some_in_tiles(y[2], cols, token + t, p * ROWS, static_cast<uint16_t *>(a.gated.data));
                    }
                });
    }
#endif
};

inline int32_t multiply(const cpmcu_multiply_args &a, int32_t ith, int32_t nth) {
    const cpmcu_matrix &m = a.weights;
    if (m.kind < CPMCU_FLOAT32 || m.kind > CPMCU_INT4) return 1;
    const bool one = a.last && !a.step->every;
    const Product product{a, m, one ? 1 : a.step->tokens, a.work + ith * a.work_stride};
    const int64_t panels = panels_of(m), begin = ith * panels / nth, end = (ith + 1) * panels / nth;
#if defined(__AMX_TILE__)
    if (gated_in_tiles(m, a.gated, a.step->tokens)) {
        const int64_t half = panels / 2;
        return product.gated_in_tiles(ith * half / nth, (ith + 1) * half / nth), 0;
    }
    if (in_tiles(m.kind, m.cols, a.step->tokens)) return product.in_tiles(begin, end), 0;
#endif
    if (product.tokens == 1) return product.vector(begin, end), 0;
    // So many tokens at a time that they and their results stay in the second-level cache.
    const int64_t some = 96;
    for (int64_t t = 0; t < product.tokens; t += some) {
        const int64_t until = t + some < product.tokens ? t + some : product.tokens;
        int64_t p = begin;
        for (; p + PANELS_AT_ONCE <= end; p += PANELS_AT_ONCE) product.panels<PANELS_AT_ONCE>(p, t, until);
        for (; p < end; ++p) product.panels<1>(p, t, until);
    }
    return 0;
}

}  // namespace NATIVE_LEVEL
}  // namespace native
