// What happens to queries and keys between the projection and attention, and attention itself.
#pragma once
#include "args.h"
#include "attend.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

template <class Source> inline void rotate_heads(const cpmcu_rotate_args &a, int32_t ith, int32_t nth) {
    const int64_t D = a.dim, half = D / 2, all = a.heads + 2 * a.kv_heads, T = a.step->tokens;
    float y[2048];
    for (int64_t i = ith; i < T * all; i += nth) {
        const int64_t t = i / all, n = i % all;
        const float *x = a.qkv + (t * all + n) * D;
        const int64_t kv = n < a.heads + a.kv_heads ? n - a.heads : n - a.heads - a.kv_heads;
        const int64_t slot = (kv * a.room + a.step->start + t) * D;
        if (n >= a.heads + a.kv_heads) {
            Source *v = static_cast<Source *>(a.v) + slot;
            for (int64_t d = 0; d < D; ++d) from_float(x[d], v + d);
            continue;
        }
        if (const float *weight = n < a.heads ? a.q_norm : a.k_norm) {
            float sum = 0.f;
            for (int64_t d = 0; d < D; ++d) sum += x[d] * x[d];
            const float factor = 1.f / std::sqrt(sum / float(D) + a.eps);
            for (int64_t d = 0; d < D; ++d) y[d] = x[d] * factor * weight[d];
            x = y;
        }
        Source *to = n < a.heads ? static_cast<Source *>(a.q) + (t * a.heads + n) * D : static_cast<Source *>(a.k) + slot;
        const float *c = a.step->cos + t * D, *s = a.step->sin + t * D;
        for (int64_t d = 0; d < half; ++d) from_float(x[d] * c[d] + x[d + half] * s[d], to + d);
        for (int64_t d = half; d < D; ++d) from_float(x[d] * c[d] + x[d - half] * s[d], to + d);
    }
}

inline int32_t rotate(const cpmcu_rotate_args &a, int32_t ith, int32_t nth) {
    if (a.dtype != 0 && a.dtype != 1) return 1;
    a.dtype ? rotate_heads<bf16>(a, ith, nth) : rotate_heads<float>(a, ith, nth);
    return 0;
}

constexpr int64_t MOST_SPLITS = 16;  // of one token's keys

// The arguments of this step: as many tokens together as fill a unit of work and leave some for each thread, or one
// token's keys in as many parts as their number asks for. Results do not depend on the number of threads.
inline native_attend_args attention_of(const cpmcu_attend_args &base, int32_t nth) {
    native_attend_args a = base.attend;
    const int64_t T = base.step->tokens, H = a.shape.kv_heads * a.shape.group;
    a.shape.queries = T, a.shape.keys = base.step->start + T;
    a.q.batch = T * H * a.shape.dim, a.q.head = a.shape.dim, a.q.row = H * a.shape.dim;
    int64_t tile = MOST_ROWS / a.shape.group;
    tile = tile > MOST_TOKENS ? MOST_TOKENS : (tile < 1 ? 1 : tile);
    tile = tile > T ? T : tile;
    while (tile > 1 && a.shape.kv_heads * ((T + tile - 1) / tile) < 4 * nth) tile /= 2;
    a.tile = tile;
    a.splits = 1;
    if (T == 1)
        while (a.splits < MOST_SPLITS && a.shape.keys > 128 * a.splits * a.splits) a.splits *= 2;
    return a;
}

}  // namespace NATIVE_LEVEL
}  // namespace native
