// What happens to queries and keys between the projection and attention, and attention itself.
#pragma once
#include "args.h"
#include "compress.hpp"
#include "run.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

constexpr int MOST_HEAD = 2048;  // size of a head: some on the stack of a thread

template <class Source> inline void rotate_heads(const cpmcu_rotate_args &a, int32_t ith, int32_t nth) {
    const int64_t D = a.dim, half = D / 2, all = a.heads + 2 * a.kv_heads, T = a.step->tokens;
    float y[MOST_HEAD];
    for (int64_t i = ith; i < T * all; i += nth) {
        const int64_t t = i / all, n = i % all;
        const float *x = a.qkv + (t * all + n) * D;
        const int64_t kv = n < a.heads + a.kv_heads ? n - a.heads : n - a.heads - a.kv_heads;
        const int64_t slot = kv * a.room + a.step->start + t;
        if (n >= a.heads + a.kv_heads) {
            if (a.int8) {
                store_row(x, int(D), static_cast<int8_t *>(a.v) + slot * (D + 4));
                continue;
            }
            Source *v = static_cast<Source *>(a.v) + slot * D;
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
        const float *c = a.step->cos + t * D, *s = a.step->sin + t * D;
        if (n >= a.heads && a.int8) {
            float turned[MOST_HEAD];
            for (int64_t d = 0; d < half; ++d) turned[d] = x[d] * c[d] + x[d + half] * s[d];
            for (int64_t d = half; d < D; ++d) turned[d] = x[d] * c[d] + x[d - half] * s[d];
            store_row(turned, int(D), static_cast<int8_t *>(a.k) + slot * (D + 4));
            continue;
        }
        Source *to = n < a.heads ? static_cast<Source *>(a.q) + (t * a.heads + n) * D : static_cast<Source *>(a.k) + slot * D;
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
struct Attention {
    bool sparse;
    native_run_args args;

    // No window, but only the keys in it: for a single token, and where it hides none.
    static void see_last(native_attend_args &a) {
        const int64_t before = a.window && a.shape.keys > a.window ? a.shape.keys - a.window : 0;
        const int64_t size = a.shape.int8 ? 1 : a.shape.dtype ? 2 : 4;
        for (native_tensor *x : {&a.k, &a.v}) x->data = static_cast<const char *>(x->data) + before * x->row * size;
        a.shape.keys -= before, a.window = 0;
    }

    Attention(const cpmcu_attend_args &base, int32_t nth) : args{base.select, base.attend} {
        native_attend_args &a = args.attend;
        native_select_args &s = args.select;
        const int64_t T = base.step->tokens, H = a.shape.kv_heads * a.shape.group;
        sparse = base.step->start + 1 >= base.sparse_from;
        a.shape.queries = T, a.shape.keys = base.step->start + T;
        if (T == 1 || a.shape.keys <= a.window) see_last(a);
        a.q.batch = T * H * a.shape.dim, a.q.head = a.shape.dim, a.q.row = H * a.shape.dim;
        int64_t tile = MOST_ROWS / a.shape.group;
        tile = tile > MOST_TOKENS ? MOST_TOKENS : (tile < 1 ? 1 : tile);
        tile = tile > T ? T : tile;
        while (tile > 1 && a.shape.kv_heads * ((T + tile - 1) / tile) < 4 * nth) tile /= 2;
        a.tile = tile;
        a.splits = 1;
        int64_t read = a.shape.keys;
        if (sparse) {
            const int64_t visited = int64_t(s.selection.budget) * s.selection.block_size;
            read = read < visited ? read : visited;
            s.shape = a.shape, s.q = a.q;
            a.blocks = T == 1 ? s.blocks : nullptr;  // of more tokens, lists live as long as their tile
            s.blocks = T == 1 ? s.blocks : nullptr;
        } else {
            a.blocks = nullptr, a.block_size = TILE;
        }
        if (T == 1)
            while (a.splits < MOST_SPLITS && read > 128 * a.splits * a.splits) a.splits *= 2;
    }
};

// A kernel is complete with its last key.
template <class Format> inline void compress_new(const cpmcu_compress_args &base, int32_t ith, int32_t nth) {
    native_compress_args c = base.compress;
    const int64_t before = base.step->start, now = before + base.step->tokens;
    const int64_t wide = c.coarse_factor * c.kernel_size, far = c.coarse_factor * c.kernel_stride;
    c.fine_begin = kernels_seen(before - 1, c.kernel_size, c.kernel_stride);
    c.fine_end = kernels_seen(now - 1, c.kernel_size, c.kernel_stride);
    c.coarse_begin = kernels_seen(before - 1, wide, far), c.coarse_end = kernels_seen(now - 1, wide, far);
    if (c.fine_end > c.fine_begin || c.coarse_end > c.coarse_begin) compress<Format>(&c, ith, nth);
}

template <class Narrow, class Wide> inline void choose_blocks(const cpmcu_attend_args &base, int32_t ith, int32_t nth) {
    const Attention now(base, nth);
    if (now.sparse && base.step->tokens == 1) select<Narrow, Wide>(&now.args.select, ith, nth);
}

template <class Narrow, class Wide> inline void attend_step(const cpmcu_attend_args &base, int32_t ith, int32_t nth) {
    const Attention now(base, nth);
    if (now.sparse && base.step->tokens > 1)
        run<Narrow, Wide>(&now.args, ith, nth);
    else
        attend<Narrow, Wide>(&now.args.attend, ith, nth, false);
}

template <class Narrow, class Wide> inline void merge_step(const cpmcu_attend_args &base, int32_t ith, int32_t nth) {
    const Attention now(base, nth);
    if (now.args.attend.splits > 1) attend<Narrow, Wide>(&now.args.attend, ith, nth, true);
}

}  // namespace NATIVE_LEVEL
}  // namespace native
