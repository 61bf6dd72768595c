// Activations to int8 (by token or by group) with the sums of each group and the tables of the 1.6bit product, or to padded
// float32.
#pragma once
#include "tables.hpp"

namespace bitcpm {
inline namespace NATIVE_LEVEL {

inline void to_floats(const void *x, int64_t begin, int64_t n, int32_t dtype, float *out) {
    if (dtype == BITCPM_FLOAT32) {
        std::memcpy(out, static_cast<const float *>(x) + begin, size_t(n) * 4);
        return;
    }
    const uint16_t *p = static_cast<const uint16_t *>(x) + begin;
    if (dtype == BITCPM_BFLOAT16)
        for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(p[i]);
    else
        for (int64_t i = 0; i < n; ++i) out[i] = from_fp16(p[i]);
}

// The largest |x|, as bits: NaN and infinity are the largest numbers there are.
inline int32_t largest(const float *x, int64_t n) {
    int32_t most = 0;
    for (int64_t i = 0; i < n; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    return most;
}

// What int8 values are worth, and what to multiply by to get them. Below 2^-100 everything is 0.
struct Rounding {
    float scale, factor;
    explicit Rounding(int32_t bits) {
        float most;
        std::memcpy(&most, &bits, 4);
        const bool finite = bits < 0x7f800000, tiny = most < 7.9e-31f;
        scale = !finite ? NAN : tiny ? 0.f : most / 127.f;
        factor = !finite || tiny ? 0.f : 127.f / most;
    }
};

inline int32_t to_int8(const float *x, int64_t n, float factor, int8_t *out) {
    if (factor == 0.f) {  // nothing, or no numbers
        std::memset(out, 0, size_t(n));
        return 0;
    }
    int32_t sum = 0;
    for (int64_t i = 0; i < n; ++i) {
        // Adding 1.5 2^23 rounds to nearest even and leaves the integer in the low bits, on every level.
        const float shifted = x[i] * factor + 12582912.f;
        int32_t bits;
        std::memcpy(&bits, &shifted, 4);
        const int8_t q = int8_t(bits);
        out[i] = q;
        sum += q;
    }
    return sum;
}

class Preparer {
    const bitcpm_prepare_args *a;
    const int64_t group, groups;
    const Prepared at;
#if BITCPM_VNNI
    const TableMaker tables;
#endif

  public:
    explicit Preparer(const bitcpm_prepare_args *args)
        : a(args), group(group_of(args->shape)), groups(groups_of(args->shape)),
          at(args->shape, args->tokens, args->mode, BITCPM_VNNI) {}

    // Groups [first, last) of token t.
    void token(int64_t t, int64_t first, int64_t last) const {
        const char *row = static_cast<const char *>(a->x) + t * a->x_stride * (a->x_dtype == BITCPM_FLOAT32 ? 4 : 2);
        char *values = a->prepared + at.values + t * at.value_stride;
        if (a->mode == BITCPM_EXACT) {
            for (int64_t g = first; g < last; ++g) exact(row, g, reinterpret_cast<float *>(values));
            return;
        }
        int32_t most = 0;
        if (a->mode == BITCPM_INT8_TOKEN) most = largest_of(row, 0, a->shape.columns);
        for (int64_t g = first; g < last; ++g) {
            if (a->mode == BITCPM_INT8_GROUP) most = largest_of(row, g * group, size(g));
            whole(row, t, g, Rounding(most), reinterpret_cast<int8_t *>(values));
        }
    }

  private:
    static constexpr int64_t PART = 960;
    int64_t size(int64_t g) const { return smaller(group, a->shape.columns - g * group); }

    int32_t largest_of(const char *row, int64_t begin, int64_t n) const {
        if (a->x_dtype == BITCPM_FLOAT32) return largest(reinterpret_cast<const float *>(row) + begin, n);
        float part[PART];
        int32_t most = 0;
        for (int64_t i = 0; i < n; i += PART) {
            const int64_t some = smaller(PART, n - i);
            to_floats(row, begin + i, some, a->x_dtype, part);
            const int32_t here = largest(part, some);
            most = here > most ? here : most;
        }
        return most;
    }

    void exact(const char *row, int64_t g, float *values) const {
        const int64_t n = size(g);
        float *out = values + g * round_up(group, 16);
        to_floats(row, g * group, n, a->x_dtype, out);
        for (int64_t i = n; i < round_up(n, 16); ++i) out[i] = 0.f;
    }

    void whole(const char *row, int64_t t, int64_t g, Rounding r, int8_t *values) const {
        const int64_t n = size(g);
        int8_t *out = values + g * round_up(group, 16);
        float part[PART];
        int32_t sum = 0;
        for (int64_t i = 0; i < n; i += PART) {
            const int64_t some = smaller(PART, n - i);
            to_floats(row, g * group + i, some, a->x_dtype, part);
            sum += to_int8(part, some, r.factor, out + i);
        }
        std::memset(out + n, 0, size_t(round_up(n, 16) - n));
        reinterpret_cast<int32_t *>(a->prepared + at.sums + t * at.group_stride)[g] = sum;
        reinterpret_cast<float *>(a->prepared + at.scales + t * at.group_stride)[g] = r.scale;
#if BITCPM_VNNI
        if (!at.table_stride) return;
        char *table = a->prepared + at.tables + t * at.table_stride + TABLE * g * div_up(group, 5);
        for (int64_t done = 0; done < n; done += SPAN)
            tables.make(out + done, smaller(SPAN, n - done), table + done / 5 * TABLE);
#endif
    }
};

inline int32_t prepare(const bitcpm_prepare_args *a, int32_t ith, int32_t nth) {
    if (!valid(a->shape) || a->tokens < 0 || a->mode < 0 || a->mode > BITCPM_EXACT || a->x_dtype < 0 || a->x_dtype > BITCPM_FLOAT16) return 1;
    if (!aligned(a->prepared)) return 2;
    const Preparer preparer(a);
    const int64_t groups = groups_of(a->shape);
    if (a->tokens >= nth) {
        for (int64_t t = share(a->tokens, ith, nth); t < share(a->tokens, ith + 1, nth); ++t) preparer.token(t, 0, groups);
    } else {
        for (int64_t t = 0; t < a->tokens; ++t) preparer.token(t, share(groups, ith, nth), share(groups, ith + 1, nth));
    }
    return 0;
}

}  // namespace NATIVE_LEVEL
}  // namespace bitcpm
