// Rows of floats as a matrix wants them, in blocks of tokens; and what happens to them on the way: normalisation,
// gating.
#pragma once
#include "multiply.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

// Row `token` of `tokens`, from floats [cols]. `step_tokens`: of the step, of which these may be the last alone.
inline void place(const cpmcu_packed &to, int64_t step_tokens, int64_t tokens, int64_t token, const float *x) {
    const int64_t cols = to.cols;
    if (to.kind == CPMCU_ROWS) {
        std::memcpy(static_cast<float *>(to.data) + token * cols, x, sizeof(float) * cols);
        return;
    }
#if defined(__AMX_TILE__)
    if (in_tiles(to.kind, cols, step_tokens)) return place_in_tiles(x, cols, token, static_cast<uint16_t *>(to.data));
#endif
    const int W = tokens == 1 ? 1 : TOKENS, t = int(token % TOKENS);
    const int64_t at = token - t;
    char *rows = static_cast<char *>(to.data) + at * bytes_of_rows(to.kind, cols);
    if (to.kind == CPMCU_FLOAT32) {
        float *out = reinterpret_cast<float *>(rows) + t;
        for (int64_t k = 0; k < cols; ++k) out[k * W] = x[k];
        return;
    }
    if (to.kind == CPMCU_BFLOAT16) {
        bf16 *out = reinterpret_cast<bf16 *>(rows) + 2 * t;
        for (int64_t k = 0; k < cols; ++k) from_float(x[k], out + k / 2 * W * 2 + k % 2);
        return;
    }
    using P = Panel;
    const int64_t groups = cols / to.group;
    const int32_t weights_zero = to.kind == CPMCU_INT8 ? 128 : 8;
    const auto minus = P::set(-1.f);
    alignas(64) int8_t q[MOST_GROUP];
    for (int64_t g = 0; g < groups; ++g) {
        const float *from = x + g * to.group;
        auto highest = P::zero(), lowest = P::zero();  // the lowest with its sign turned
        bool odd = false;
        for (int i = 0; i < to.group; i += ROWS) {
            const auto value = P::load(from + i);
            highest = P::max(value, highest), lowest = P::max(P::mul(value, minus), lowest);
            odd |= P::any_nan(value);
        }
        const float high = P::most(highest), low = P::most(lowest);
        // 255 codes from the lowest to the highest: one less than there are, for both ends are rounded.
        float scale = high / 254.f + low / 254.f;
        // What is not finite spoils the row on purpose: the logits tell.
        odd |= !(scale < INFINITY);
        if (scale < 1e-30f) scale = 0.f;  // its inverse is none
        const float inverse = scale > 0.f && !odd ? 1.f / scale : 0.f;
        const int32_t zero = odd ? 0 : int32_t(std::rint(low * inverse)) - 128;
        const auto steps = P::set(inverse);
        const auto shift = P::unit(&zero);
        int32_t sum = 0;
        for (int i = 0; i < to.group; i += ROWS) {
            const auto code = odd ? P::none() : P::round(P::mul(P::load(from + i), steps));
            P::store_bytes(q + i, P::add(code, shift));
            sum += P::sum(code);
        }
        const int64_t slot = at * groups + g * W + t;
        to.scales[slot] = odd ? NAN : scale;
        to.offsets[slot] = -weights_zero * sum;
        to.zeros[slot] = -zero;
        for (int k = 0; k < to.group; k += 4) std::memcpy(rows + ((g * to.group + k) / 4 * W + t) * 4, q + k, 4);
    }
}

// Calls f(token) for share `ith` of `nth` of `tokens`.
template <class F> inline void for_share(int64_t tokens, int32_t ith, int32_t nth, F f) {
    for (int64_t token = tokens * ith / nth; token < tokens * (ith + 1) / nth; ++token) f(token);
}

constexpr int MOST_COLUMNS = 1 << 15;  // of a matrix: a row of floats on the stack of a thread

inline int32_t norm(const cpmcu_norm_args &a, int32_t ith, int32_t nth) {
    const int64_t cols = a.to.cols, T = a.step->tokens;
    const bool one = a.last && !a.step->every;
    float y[MOST_COLUMNS];
    const int64_t tokens = one ? 1 : T;
    for_share(tokens, ith, nth, [&](int64_t token) {
        const float *x = a.x + (one ? T - 1 : token) * cols;
        auto part = Panel::zero();
        int64_t at = 0;
        for (; at + ROWS <= cols; at += ROWS) part = Panel::fma(Panel::load(x + at), Panel::load(x + at), part);
        float sum = Panel::sum(part);
        for (; at < cols; ++at) sum += x[at] * x[at];
        const float factor = a.scale / std::sqrt(sum / float(cols) + a.eps);
        for (int64_t i = 0; i < cols; ++i) y[i] = x[i] * factor * a.weight[i];
        place(a.to, T, tokens, token, y);
    });
    return 0;
}

template <class Source> inline void pack_rows(const cpmcu_pack_args &a, int32_t ith, int32_t nth) {
    const int64_t T = a.step->tokens;
    float y[MOST_COLUMNS];
    for_share(T, ith, nth, [&](int64_t token) {
        for (int64_t h = 0; h < a.heads; ++h) {
            const Source *from = static_cast<const Source *>(a.out) + (h * T + token) * a.dim;
            for (int64_t d = 0; d < a.dim; ++d) y[h * a.dim + d] = to_float(from[d]);
        }
        place(a.to, T, T, token, y);
    });
}

inline int32_t pack(const cpmcu_pack_args &a, int32_t ith, int32_t nth) {
    if (a.dtype != 0 && a.dtype != 1) return 1;
    a.dtype ? pack_rows<bf16>(a, ith, nth) : pack_rows<float>(a, ith, nth);
    return 0;
}

inline int32_t swiglu(const cpmcu_swiglu_args &a, int32_t ith, int32_t nth) {
    const int64_t F = a.to.cols, T = a.step->tokens;
    if (gated_in_tiles(a.weights, a.to, T)) return 0;
    float y[MOST_COLUMNS];
    for_share(T, ith, nth, [&](int64_t token) {
        const float *gate = a.gate_up + token * 2 * F;
        gated(gate, gate + F, F, y);
        place(a.to, T, T, token, y);
    });
    return 0;
}

inline int32_t add(const cpmcu_add_args &a, int32_t ith, int32_t nth) {
    const int64_t n = a.step->tokens * a.width;
    const auto alpha = Panel::set(a.alpha);
    for (int64_t i = n / ROWS * ith / nth * ROWS; i < n / ROWS * (ith + 1) / nth * ROWS; i += ROWS)
        Panel::store(a.x + i, Panel::fma(Panel::load(a.y + i), alpha, Panel::load(a.x + i)));
    if (ith == 0)
        for (int64_t i = n / ROWS * ROWS; i < n; ++i) a.x[i] += a.alpha * a.y[i];
    return 0;
}

// ---- weights: the other side of the product

// Row `r` of a matrix as floats.
inline void row_of(const cpmcu_matrix &m, int64_t r, float *to) {
    const char *panel = static_cast<const char *>(m.data) + r / ROWS * panel_bytes(m);
    const int64_t lane = r % ROWS;
    if (m.kind == CPMCU_FLOAT32) {
        for (int64_t k = 0; k < m.cols; ++k) to[k] = reinterpret_cast<const float *>(panel)[k * ROWS + lane];
    } else if (m.kind == CPMCU_BFLOAT16) {
        for (int64_t k = 0; k < m.cols; ++k) to[k] = to_float(reinterpret_cast<const bf16 *>(panel)[(k / 2 * ROWS + lane) * 2 + k % 2]);
    } else {
        const uint8_t *bytes = reinterpret_cast<const uint8_t *>(panel);
        const int64_t first = r / ROWS * (m.cols / m.group) * ROWS + lane;
        const uint16_t *scales = m.scales + first, *shifts = m.shifts ? m.shifts + first : nullptr;
        for (int64_t k = 0; k < m.cols; ++k) {
            int code;
            if (m.kind == CPMCU_INT8)
                code = bytes[(k / 4 * ROWS + lane) * 4 + k % 4] - 128;
            else
                code = (bytes[(k / 8 * ROWS + lane) * 4 + k % 4] >> (k / 4 % 2 * 4) & 15) - 8;
            const int64_t g = k / m.group * ROWS;
            to[k] = float(code) * half_to_float(scales[g]) + (shifts ? half_to_float(shifts[g]) : 0.f);
        }
    }
}

inline int32_t embed(const cpmcu_embed_args &a, int32_t ith, int32_t nth) {
    const int64_t cols = a.table.cols;
    for (int64_t t = ith; t < a.step->tokens; t += nth) {
        float *x = a.x + t * cols;
        row_of(a.table, a.step->ids[t], x);
        for (int64_t i = 0; i < cols; ++i) x[i] *= a.scale;
    }
    return 0;
}

}  // namespace NATIVE_LEVEL
}  // namespace native
