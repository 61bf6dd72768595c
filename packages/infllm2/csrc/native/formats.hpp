// Copied from common/native/formats.hpp by common/sync.py: change it there.
// How keys and values of each dtype become the broadcast operand of a product, 64 of them at a time; and, for the
// backward pass, how rows become the other operand.
#pragma once
#include "broadcast_gemm.hpp"
#include "int8_rows.hpp"
#include <type_traits>
#include <utility>

namespace native {
inline namespace NATIVE_LEVEL {

constexpr int TILE = 64;  // keys at a time

// A tile as the product reads it: element (column n, step k) is data[n * column + k * step].
template <class Unit> struct Tile {
    const Unit *data;
    ptrdiff_t column, step;
};

// What both formats that multiply floats share.
template <class V, class S> struct FloatProducts {
    using Lanes = V;
    using Source = S;  // of queries and results
    using Cached = S;  // of keys and values
    using Dot = FloatDot<V>;
    static constexpr int BESIDE = 0;  // elements of a cached row beside its numbers
    static constexpr bool FEW_HEADS = false;  // few_heads.hpp has a kernel
    static constexpr int EXP_DEGREE = 5;  // of the weights' exponential
    static int units(int n) { return n; }
    static void pack_query(const Source *q, int dim, float *out, int stride) {
        for (int d = 0; d < dim; ++d) out[d * stride] = to_float(q[d]);
    }
    static void pack_weights(float *, int) {}
    // A lane group's weights [n][L] as the broadcast operand: `ROWS` units a key, keys `stride` apart.
    static constexpr int ROWS = V::L;
    static void pack_rows(const float *s, int n, typename Dot::Unit *out, int stride) {
        for (int i = 0; i < n; ++i) std::memcpy(out + i * stride, s + i * V::L, sizeof(float) * V::L);
    }
    // Row `i` with lanes along the head size: [dim / L][units][L].
    static void place_row(const Source *x, int dim, int i, int units, float *out) {
        for (int d = 0; d < dim; ++d) out[(ptrdiff_t(d / V::L) * units + i) * V::L + d % V::L] = to_float(x[d]);
    }
};

// float32: read where it lies.
template <class V> struct Float32 : FloatProducts<V, float> {
    using Selecting = Float32;  // of compressed keys, which are never int8
    static Tile<float> keys(const float *k, ptrdiff_t row, int, int, float *) { return {k, row, 1}; }
    struct Values : Nothing {
        Tile<float> tile;
        Values(const float *v, ptrdiff_t row, int, int, float *) : tile{v, 1, row} {}
        Tile<float> finish(int) const { return tile; }
    };
};

template <class V> inline void widen_rows(const bf16 *x, ptrdiff_t row, int n, int dim, float *out) {
    for (int i = 0; i < n; ++i) {
        int d = 0;
        for (; d + V::L <= dim; d += V::L) V::load_bf16(x + i * row + d, out + i * dim + d);
        for (; d < dim; ++d) out[i * dim + d] = to_float(x[i * row + d]);
    }
}
template <class V> inline void widen_rows(const int8_t *x, ptrdiff_t row, int n, int dim, float *out) { widen_rows(x, row, n, dim, out); }

// Rows of another type, widened to floats tile by tile.
template <class V, class S, class C> struct Widened : FloatProducts<V, S> {
    using Cached = C;
    static Tile<float> keys(const C *k, ptrdiff_t row, int n, int dim, float *scratch) {
        widen_rows<V>(k, row, n, dim, scratch);
        return {scratch, dim, 1};
    }
    struct Values : Nothing {
        Tile<float> tile;
        Values(const C *v, ptrdiff_t row, int n, int dim, float *scratch) : tile{scratch, 1, dim} { widen_rows<V>(v, row, n, dim, scratch); }
        Tile<float> finish(int) const { return tile; }
    };
};

// bfloat16 without a bf16 dot product.
template <class V> struct Bf16Widened : Widened<V, bf16, bf16> {
    using Selecting = Bf16Widened;
};

// int8 rows by way of floats.
template <class V, class S> struct Int8Floats : Widened<V, S, int8_t> {
    using Selecting = std::conditional_t<std::is_same_v<S, float>, Float32<V>, Bf16Widened<V>>;
    static constexpr int BESIDE = 4;
};

#if defined(__AVX512BF16__)
// bfloat16 by its dot product of pairs. Pairs of a key are neighbours already; values are paired with
// those of the next key. Needs an even head size and rows that begin on 32 bits.
template <class V> struct Bf16Pairs {
    using Selecting = Bf16Pairs;
    using Lanes = V;
    using Source = bf16;
    using Cached = bf16;
    using Dot = PairDot<V>;
    static constexpr int BESIDE = 0;
    static constexpr bool FEW_HEADS = true;
    static constexpr int EXP_DEGREE = 3;  // weights are rounded to bfloat16
    static int units(int n) { return (n + 1) / 2; }
    static Tile<uint32_t> keys(const bf16 *k, ptrdiff_t row, int, int, float *) {
        return {reinterpret_cast<const uint32_t *>(k), row / 2, 1};
    }
    // Values become pairs beside the product with their keys, whose steps hide the shuffles and stores: N columns take
    // dim / 2 steps, in which 32 elements of a pair go at a time.
    struct Values {
        const bf16 *v;
        ptrdiff_t row;
        int n, dim;
        uint32_t *out;
        Values(const bf16 *values, ptrdiff_t stride, int count, int head_size, float *scratch)
            : v(values), row(stride), n(count), dim(head_size), out(reinterpret_cast<uint32_t *>(scratch)) {}
        template <int N> void step(int first, int k, int) const {
            constexpr int EVERY = 32 / N, PAIRS = N / 2;
            const int d = k / EVERY / PAIRS * 32;
            if (k % EVERY == 0 && d + 32 <= dim) pair(first / 2 + k / EVERY % PAIRS, d);
        }
        // What is left once the first `done` columns had their steps.
        Tile<uint32_t> finish(int done) const {
            for (int i = done / 2; i < n / 2; ++i)
                for (int d = 0; d + 32 <= dim; d += 32) pair(i, d);
            const int even = n & ~1;
            for (int d = dim & ~31; d < dim; ++d)
                for (int i = 0; i < even; i += 2) out[i / 2 * dim + d] = v[i * row + d] | uint32_t(v[(i + 1) * row + d]) << 16;
            for (int d = 0; n > even && d < dim; ++d) out[even / 2 * dim + d] = v[even * row + d];
            return {out, 1, dim};
        }

      private:
        void pair(int i, int d) const {
            const bf16 *from = v + 2 * i * row + d;
            uint32_t *to = out + i * dim + d;
            const __m512i even = _mm512_loadu_si512(from), odd = _mm512_loadu_si512(from + row);
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low_half(), odd));
            _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(even, high_half(), odd));
        }
    };
    static void pack_query(const bf16 *q, int dim, float *out, int stride) {
        for (int d = 0; d < dim; d += 2) {
            const uint32_t pair = q[d] | uint32_t(q[d + 1]) << 16;
            std::memcpy(out + d / 2 * stride, &pair, 4);
        }
    }
    // In place: weights of keys 2i and 2i + 1 (0 past the end) go where those of key i were.
    static void pack_weights(float *s, int n) {
        constexpr int L = V::L;
        if (n & 1) V::store(s + n * L, V::zero());
        for (int i = 0; i < n; i += 2) Dot::pack(s + i * L, s + (i + 1) * L, s + i / 2 * L);
    }
    // Pairs of neighbouring rows.
    static constexpr int ROWS = V::L / 2;
    static void pack_rows(const float *s, int n, uint32_t *out, int stride) {
        for (int i = 0; i < n; ++i) Dot::narrow(s + i * V::L, out + i * stride);
    }
    static void place_row(const bf16 *x, int dim, int i, int units, float *out) {
        for (int d = 0; d < dim; ++d) {
            bf16 *pair = reinterpret_cast<bf16 *>(out + (ptrdiff_t(d / V::L) * units + i / 2) * V::L + d % V::L);
            pair[i & 1] = x[d];
        }
    }

  private:
    static __m512i low_half() {
        return _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                                39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    }
    static __m512i high_half() { return _mm512_add_epi16(low_half(), _mm512_set1_epi16(16)); }
};

// int8 rows by way of bfloat16 ones: half of the memory traffic for some instructions.
template <class V> struct Int8Pairs : Bf16Pairs<V> {
    using Cached = int8_t;
    static constexpr int BESIDE = 4;
    static Tile<uint32_t> keys(const int8_t *k, ptrdiff_t row, int n, int dim, float *scratch) {
        bf16 *wide = reinterpret_cast<bf16 *>(scratch);
        widen_rows(k, row, n, dim, wide);
        return Bf16Pairs<V>::keys(wide, dim, n, dim, scratch);
    }
    // Pairs take the first half of the scratch.
    struct Values : Bf16Pairs<V>::Values {
        Values(const int8_t *v, ptrdiff_t row, int n, int dim, float *scratch) : Bf16Pairs<V>::Values(widened(v, row, n, dim, scratch), dim, n, dim, scratch) {}
        static const bf16 *widened(const int8_t *v, ptrdiff_t row, int n, int dim, float *scratch) {
            bf16 *wide = reinterpret_cast<bf16 *>(scratch + TILE * dim / 2);
            widen_rows(v, row, n, dim, wide);
            return wide;
        }
    };
};
#endif

// What a level computes with: its widest vector, a narrower one for few rows, and its way with bfloat16.
#if defined(__AVX512F__)
using Wide = Zmm;
using Narrow = Ymm;
#elif defined(__AVX2__)
using Wide = Ymm;
using Narrow = Ymm;
#else
using Wide = Plain<8>;
using Narrow = Plain<8>;
#endif
#if defined(__AVX512BF16__)
template <class V> using Bf16 = Bf16Pairs<V>;
template <class V> using Bf16OfInt8 = Int8Pairs<V>;
#else
template <class V> using Bf16 = Bf16Widened<V>;
template <class V> using Bf16OfInt8 = Int8Floats<V, bf16>;
#endif
template <class V> using Float32OfInt8 = Int8Floats<V, float>;

// Columns a known distance apart cost no address arithmetic: the usual head sizes have their own copy. The rows of
// the G lane groups lie `apart` floats from each other.
template <class Format, int G, class Aside = Nothing>
inline void scores(const Tile<typename Format::Dot::Unit> &keys, int n, const float *q, ptrdiff_t apart, int depth, float *s,
                   const Aside &aside = Aside()) {
    using V = typename Format::Lanes;
    using Dot = typename Format::Dot;
    constexpr int GROUP = TILE * V::L;
    if (keys.column == 64)
        broadcast_gemm<V, Dot, G, 64>(keys.data, 64, 1, q, apart, depth, n, s, GROUP, false, aside);
    else if (keys.column == 32)
        broadcast_gemm<V, Dot, G, 32>(keys.data, 32, 1, q, apart, depth, n, s, GROUP, false, aside);
    else if (keys.column == 128)
        broadcast_gemm<V, Dot, G, 128>(keys.data, 128, 1, q, apart, depth, n, s, GROUP, false, aside);
    else
        broadcast_gemm<V, Dot, G>(keys.data, keys.column, 1, q, apart, depth, n, s, GROUP, false, aside);
}

}  // namespace NATIVE_LEVEL
}  // namespace native
