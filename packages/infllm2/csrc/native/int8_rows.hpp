// Copied from common/native/int8_rows.hpp by common/sync.py: change it there.
// Rows of a cache in eight bits: `dim` codes, then the float32 that they are multiplied by.
#pragma once
#include "lanes.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

inline float row_scale(const int8_t *row, int dim) {
    float scale;
    std::memcpy(&scale, row + dim, 4);
    return scale;
}

// The largest magnitude becomes 127. A row with a value that is not finite is all NaN: the logits tell.
inline void store_row(const float *x, int dim, int8_t *row) {
    float most = 0.f;
    bool odd = false;
    for (int d = 0; d < dim; ++d) {
        const float size = std::fabs(x[d]);
        most = size > most ? size : most;
        odd |= !(size < INFINITY);
    }
    const float scale = odd ? NAN : most / 127.f, inverse = most > 0.f && !odd ? 127.f / most : 0.f;
    for (int d = 0; d < dim; ++d) row[d] = odd ? int8_t(0) : int8_t(std::rint(x[d] * inverse));
    std::memcpy(row + dim, &scale, 4);
}

#if defined(__AVX512F__)
inline void store_lanes(__m512 x, float *out) { _mm512_storeu_ps(out, x); }
#if defined(__AVX512BF16__)
inline void store_lanes(__m512 x, bf16 *out) { _mm256_storeu_si256((__m256i *)out, (__m256i)_mm512_cvtneps_pbh(x)); }
#endif
#endif

template <class S> inline void widen_row(const int8_t *row, int dim, S *out) {
    const float scale = row_scale(row, dim);
    int d = 0;
#if defined(__AVX512F__)
    const __m512 factor = _mm512_set1_ps(scale);
    for (; d + 16 <= dim; d += 16)
        store_lanes(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(row + d)))), factor), out + d);
#elif defined(__AVX2__)
    const __m256 factor = _mm256_set1_ps(scale);
    for (; d + 8 <= dim; d += 8)
        _mm256_storeu_ps(out + d, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(row + d)))), factor));
#endif
    for (; d < dim; ++d) from_float(scale * float(row[d]), out + d);
}

template <class S> inline void widen_rows(const int8_t *x, ptrdiff_t row, int n, int dim, S *out) {
    for (int i = 0; i < n; ++i) widen_row(x + i * row, dim, out + i * dim);
}

}  // namespace NATIVE_LEVEL
}  // namespace native
