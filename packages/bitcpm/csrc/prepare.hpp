// Activations to int8 (by token or by group) with the sums of each group, or to padded float32.
#pragma once
#include "layout.hpp"
#include "vectors.hpp"

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
    const I without_sign = set(0x7fffffff);
    const int64_t whole = n - n % 16;
    I lanes = zero();
    for (int64_t i = 0; i < whole; i += 16) lanes = maximum(lanes, both(load(x + i), without_sign));
    int32_t all[16], most = 0;
    store(all, lanes);
    for (int32_t bits : all) most = bits > most ? bits : most;
    for (int64_t i = whole; i < n; ++i) {
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
    // Adding 1.5 2^23 rounds to nearest even and leaves the integer in the low bits, on every level.
    constexpr float MAGIC = 12582912.f;
    constexpr int32_t MAGIC_BITS = 0x4b400000;
    const int64_t whole = n - n % 16;
    I lanes = zero();
    for (int64_t i = 0; i < whole; i += 16) {
        const I q = sub(bits_of(fadd(fmul(fload(x + i), fset(factor)), fset(MAGIC))), set(MAGIC_BITS));
        store_bytes(out + i, q);
        lanes = add(lanes, q);
    }
    int32_t all[16], sum = 0;
    store(all, lanes);
    for (int32_t q : all) sum += q;
    for (int64_t i = whole; i < n; ++i) {
        const float shifted = x[i] * factor + MAGIC;
        int32_t bits;
        std::memcpy(&bits, &shifted, 4);
        sum += out[i] = int8_t(bits - MAGIC_BITS);
    }
    return sum;
}

class Preparer {
    const bitcpm_prepare_args *a;
    const int64_t group;
    const Prepared at;

  public:
    explicit Preparer(const bitcpm_prepare_args *args)
        : a(args), group(group_of(args->shape)),
          at(args->shape, args->tokens, args->mode) {}

    // Parts [begin, end) of token t.
    void token(int64_t t, int64_t begin, int64_t end) const {
        const char *row = static_cast<const char *>(a->x) + t * a->x_stride * (a->x_dtype == BITCPM_FLOAT32 ? 4 : 2);
        char *values = a->prepared + at.values + t * at.value_stride;
        const int32_t most = a->mode == BITCPM_INT8_TOKEN ? largest_of(row, 0, a->shape.columns) : 0;
        int64_t number = 0;
        each_part(a->shape, [&](const Part &part) {
            const int64_t mine = number++;
            if (mine < begin || mine >= end) return;
            if (a->mode == BITCPM_EXACT) return exact(row, part, reinterpret_cast<float *>(values));
            const int32_t here = a->mode == BITCPM_INT8_TOKEN ? most : largest_of(row, part.group * group, size(part.group));
            whole(row, t, part, Rounding(here), reinterpret_cast<int8_t *>(values));
        });
    }

  private:
    int64_t size(int64_t g) const { return smaller(group, a->shape.columns - g * group); }

    int32_t largest_of(const char *row, int64_t begin, int64_t n) const {
        if (a->x_dtype == BITCPM_FLOAT32) return largest(reinterpret_cast<const float *>(row) + begin, n);
        float some[SPAN];
        int32_t most = 0;
        for (int64_t i = 0; i < n; i += SPAN) {
            to_floats(row, begin + i, smaller(SPAN, n - i), a->x_dtype, some);
            const int32_t here = largest(some, smaller(SPAN, n - i));
            most = here > most ? here : most;
        }
        return most;
    }

    void exact(const char *row, const Part &part, float *values) const {
        float *out = values + part.first;
        to_floats(row, part.column, part.columns, a->x_dtype, out);
        for (int64_t i = part.columns; i < round_up(part.columns, 16); ++i) out[i] = 0.f;
    }

    // int8 values of n <= SPAN columns, and their sum.
    int32_t round(const char *row, int64_t column, int64_t n, float factor, int8_t *out) const {
        if (a->x_dtype == BITCPM_FLOAT32) return to_int8(reinterpret_cast<const float *>(row) + column, n, factor, out);
        float some[SPAN];
        to_floats(row, column, n, a->x_dtype, some);
        return to_int8(some, n, factor, out);
    }

    void whole(const char *row, int64_t t, const Part &part, Rounding r, int8_t *values) const {
        const int64_t n = part.columns;
        int8_t *out = values + part.first;
        int32_t sum = round(row, part.column, n, r.factor, out);
        std::memset(out + n, 0, size_t(round_up(n, 16) - n));
        if (part.ends) {
            int8_t other[SPAN];  // another thread may have the group's other parts, which are few
            for (int64_t c = part.group * group; c < part.column; c += SPAN) sum += round(row, c, SPAN, r.factor, other);
            reinterpret_cast<int32_t *>(a->prepared + at.sums + t * at.group_stride)[part.group] = sum;
            reinterpret_cast<float *>(a->prepared + at.scales + t * at.group_stride)[part.group] = r.scale;
        }
    }
};

inline int32_t prepare(const bitcpm_prepare_args *a, int32_t ith, int32_t nth) {
    if (!valid(a->shape) || a->tokens < 0 || a->mode < 0 || a->mode > BITCPM_EXACT || a->x_dtype < 0 || a->x_dtype > BITCPM_FLOAT16) return 1;
    if (!aligned(a->prepared)) return 2;
    const Preparer preparer(a);
    const int64_t parts = parts_of(a->shape);
    if (a->tokens >= nth) {
        for (int64_t t = share(a->tokens, ith, nth); t < share(a->tokens, ith + 1, nth); ++t) preparer.token(t, 0, parts);
    } else {
        for (int64_t t = 0; t < a->tokens; ++t) preparer.token(t, share(parts, ith, nth), share(parts, ith + 1, nth));
    }
    return 0;
}

}  // namespace NATIVE_LEVEL
}  // namespace bitcpm
