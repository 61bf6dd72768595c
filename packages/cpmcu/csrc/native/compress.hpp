// Copied from common/native/compress.hpp by common/sync.py: change it there.
// Compressed keys: means of keys over overlapping kernels (arXiv 2509.24663, section 3.1).
//
// Sums run in the order of infllm2/compression.py, keys within a stride, strides within a kernel, so that keys
// compressed as they arrive, all at once, or by PyTorch are the same bits.
#pragma once
#include "select_args.h"
#include "int8_rows.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

// Lanes d, d + 1, ... of a row, and one of them.
template <class V> inline typename V::T lanes_of(const float *row, int d, int) { return V::load(row + d); }
template <class V> inline typename V::T lanes_of(const bf16 *row, int d, int) {
    float wide[V::L];
    V::load_bf16(row + d, wide);
    return V::load(wide);
}
template <class V> inline typename V::T lanes_of(const int8_t *row, int d, int dim) {
    float wide[V::L];
    const float scale = row_scale(row, dim);
    for (int i = 0; i < V::L; ++i) wide[i] = scale * float(row[d + i]);
    return V::load(wide);
}
template <class S> inline float value_of(const S *row, int d, int) { return to_float(row[d]); }
inline float value_of(const int8_t *row, int d, int dim) { return row_scale(row, dim) * float(row[d]); }

// The mean over `width` steps of `factor` strides of `stride` keys each.
template <class V, class Cached, class Source>
inline void mean_of(const Cached *k, ptrdiff_t row, int width, int factor, int stride, int dim, Source *out) {
    const float size = float(width * factor * stride);
    const auto summed = [&](int d, auto zero, auto load, auto add) {
        auto total = zero, part = zero, step = zero;
        const Cached *p = k;
        for (int w = 0; w < width; ++w) {
            for (int f = 0; f < factor; ++f) {
                for (int i = 0; i < stride; ++i, p += row) step = i ? add(step, load(p, d)) : load(p, d);
                part = f ? add(part, step) : step;
            }
            total = w ? add(total, part) : part;
        }
        return total;
    };
    int d = 0;
    for (; d + V::L <= dim; d += V::L) {
        float total[V::L];
        V::store(total, summed(d, V::zero(), [dim](const Cached *p, int at) { return lanes_of<V>(p, at, dim); },
                               [](typename V::T a, typename V::T b) { return V::add(a, b); }));
        for (int i = 0; i < V::L; ++i) from_float(total[i] / size, out + d + i);
    }
    for (; d < dim; ++d)
        from_float(summed(d, 0.f, [dim](const Cached *p, int at) { return value_of(p, at, dim); }, [](float a, float b) { return a + b; }) / size, out + d);
}

template <class Format> void compress(const native_compress_args *a, int32_t ith, int32_t nth) {
    using V = typename Format::Lanes;
    using Source = typename Format::Source;
    using Cached = typename Format::Cached;
    const int width = a->kernel_size / a->kernel_stride;
    const int64_t fine = a->fine_end - a->fine_begin, count = fine + a->coarse_end - a->coarse_begin;
    for (int64_t item = ith; item < a->batch * a->kv_heads * count; item += nth) {
        const int64_t pair = item / count, b = pair / a->kv_heads, h = pair % a->kv_heads, i = item % count;
        const bool coarse = i >= fine;
        const int64_t j = coarse ? a->coarse_begin + i - fine : a->fine_begin + i;
        const native_tensor &to = coarse ? a->coarse : a->fine;
        const int factor = coarse ? a->coarse_factor : 1;
        const Cached *k = static_cast<const Cached *>(a->keys.data) + b * a->keys.batch + h * a->keys.head + j * factor * a->kernel_stride * a->keys.row;
        Source *out = static_cast<Source *>(const_cast<void *>(to.data)) + b * to.batch + h * to.head + j * to.row;
        mean_of<V>(k, a->keys.row, width, factor, a->kernel_stride, int(a->dim), out);
    }
}

}  // namespace NATIVE_LEVEL
}  // namespace native
