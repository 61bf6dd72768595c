// Copied from common/native/compress.hpp by common/sync.py: change it there.
// Compressed keys: means of keys over overlapping kernels (arXiv 2509.24663, section 3.1).
//
// Sums run in the order of infllm2/compression.py, keys within a stride, strides within a kernel, so that keys
// compressed as they arrive, all at once, or by PyTorch are the same bits.
#pragma once
#include "select_args.h"
#include "lanes.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

template <class V> inline typename V::T load_floats(const float *p) { return V::load(p); }
template <class V> inline typename V::T load_floats(const bf16 *p) {
    float wide[V::L];
    V::load_bf16(p, wide);
    return V::load(wide);
}

// The mean over `width` steps of `factor` strides of `stride` keys each.
template <class V, class Source>
inline void mean_of(const Source *k, ptrdiff_t row, int width, int factor, int stride, int dim, Source *out) {
    const float size = float(width * factor * stride);
    const auto summed = [&](int d, auto zero, auto load, auto add) {
        auto total = zero, part = zero, step = zero;
        const Source *p = k + d;
        for (int w = 0; w < width; ++w) {
            for (int f = 0; f < factor; ++f) {
                for (int i = 0; i < stride; ++i, p += row) step = i ? add(step, load(p)) : load(p);
                part = f ? add(part, step) : step;
            }
            total = w ? add(total, part) : part;
        }
        return total;
    };
    int d = 0;
    for (; d + V::L <= dim; d += V::L) {
        float total[V::L];
        V::store(total, summed(d, V::zero(), [](const Source *p) { return load_floats<V>(p); },
                               [](typename V::T a, typename V::T b) { return V::add(a, b); }));
        for (int i = 0; i < V::L; ++i) from_float(total[i] / size, out + d + i);
    }
    for (; d < dim; ++d)
        from_float(summed(d, 0.f, [](const Source *p) { return to_float(*p); }, [](float a, float b) { return a + b; }) / size, out + d);
}

template <class Format> void compress(const native_compress_args *a, int32_t ith, int32_t nth) {
    using V = typename Format::Lanes;
    using Source = typename Format::Source;
    const int width = a->kernel_size / a->kernel_stride;
    const int64_t fine = a->fine_end - a->fine_begin, count = fine + a->coarse_end - a->coarse_begin;
    for (int64_t item = ith; item < a->batch * a->kv_heads * count; item += nth) {
        const int64_t pair = item / count, b = pair / a->kv_heads, h = pair % a->kv_heads, i = item % count;
        const bool coarse = i >= fine;
        const int64_t j = coarse ? a->coarse_begin + i - fine : a->fine_begin + i;
        const native_tensor &to = coarse ? a->coarse : a->fine;
        const int factor = coarse ? a->coarse_factor : 1;
        const Source *k = static_cast<const Source *>(a->keys.data) + b * a->keys.batch + h * a->keys.head + j * factor * a->kernel_stride * a->keys.row;
        Source *out = static_cast<Source *>(const_cast<void *>(to.data)) + b * to.batch + h * to.head + j * to.row;
        mean_of<V>(k, a->keys.row, width, factor, a->kernel_stride, int(a->dim), out);
    }
}

}  // namespace NATIVE_LEVEL
}  // namespace native
