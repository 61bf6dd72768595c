// Weights, as a file has them, into the layouts of args.h: read once, where they lie, and written once.
//
//   Q4_0  32 columns, 18 bytes: float16 d, then byte m has code + 8 of column m in its low and of m + 16 in its high half
//   Q8_0  32 columns, 34 bytes: float16 d, then 32 signed bytes
//   Q4_1  32 columns, 20 bytes: float16 d and least, then bytes as in Q4_0
//   Q4_K  256 columns, 144 bytes: float16 d and e, 12 bytes with eight s and eight l of 6 bits, then for each 64 columns
//         32 bytes, of which byte m has the code of column m in its low and of m + 32 in its high half
// A weight is code * d in the first two, (code + 8) * d + least in Q4_1, and (code + 8) * s d - l e in Q4_K, with an s and
// an l for 32 columns.
#pragma once
#include "pack.hpp"

namespace native {
inline namespace NATIVE_LEVEL {

constexpr int BLOCK = 32, LARGE_BLOCK = 256;  // columns of a block of GGUF

template <class T> inline T load_as(const void *p) {
    T x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

inline bool is_finite_half(uint16_t h) { return (h & 0x7c00) != 0x7c00; }

// One row of codes, wherever it comes from.
struct CodedRow {
    const char *codes;
    const uint16_t *scales;  // null: within the blocks
    int32_t source, group;

    // Where the block of column k lies.
    const char *block(int64_t k) const {
        switch (source) {
        case CPMCU_OF_Q4_0: return codes + k / BLOCK * 18;
        case CPMCU_OF_Q8_0: return codes + k / BLOCK * 34;
        case CPMCU_OF_Q4_1: return codes + k / BLOCK * 20;
        default: return codes + k / LARGE_BLOCK * 144;
        }
    }
    bool shifted() const { return source >= CPMCU_OF_Q4_1; }
    // Of Q4_K, what the block's number `which` is multiplied by for group g: s, or l.
    float small(int64_t g, int which) const {
        const uint8_t *q = reinterpret_cast<const uint8_t *>(block(g * BLOCK)) + 4;
        const int j = int(g % 8), i = which ? 4 : 0;
        return float(j < 4 ? q[j + i] & 63 : (which ? q[j + 4] >> 4 : q[j + 4] & 15) | q[j - 4 + i] >> 6 << 4);
    }
    float scale(int64_t g) const {
        if (scales) return half_to_float(load_as<uint16_t>(scales + g));
        const float d = half_to_float(load_as<uint16_t>(block(g * BLOCK)));
        return source == CPMCU_OF_Q4_K ? d * small(g, 0) : d;
    }
    // The weight of the lowest code, of what is shifted.
    float least(int64_t g) const {
        const float second = half_to_float(load_as<uint16_t>(block(g * BLOCK) + 2));
        return source == CPMCU_OF_Q4_K ? -second * small(g, 1) : second;
    }
    int code(int64_t k) const {
        const uint8_t *u = reinterpret_cast<const uint8_t *>(scales ? codes : block(k));
        switch (source) {
        case CPMCU_OF_INT8: return int8_t(u[k]);
        case CPMCU_OF_NIBBLES: return int(u[k / 2] >> (k % 2 * 4) & 15) - 8;
        case CPMCU_OF_Q4_0: return int(u[2 + k % 16] >> (k % BLOCK / 16 * 4) & 15) - 8;
        case CPMCU_OF_Q4_1: return int(u[4 + k % 16] >> (k % BLOCK / 16 * 4) & 15) - 8;
        case CPMCU_OF_Q4_K: return int(u[16 + k % LARGE_BLOCK / 64 * 32 + k % BLOCK] >> (k % 64 / BLOCK * 4) & 15) - 8;
        default: return int8_t(u[2 + k % BLOCK]);
        }
    }
    float weight(int64_t k, float scale, float least) const {
        return shifted() ? float(code(k) + 8) * scale + least : float(code(k)) * scale;
    }
};

inline bool is_coded(int32_t source) { return source == CPMCU_OF_INT8 || source >= CPMCU_OF_NIBBLES; }

// A row as floats.
inline void read_row(const cpmcu_lay_out_args &a, const char *from, const uint16_t *scales, int64_t cols, float *to) {
    if (is_coded(a.source)) {
        const CodedRow row{from, scales, a.source, a.group};
        for (int64_t g = 0; g < cols / a.group; ++g) {
            const float scale = row.scale(g), least = row.shifted() ? row.least(g) : 0.f;
            for (int64_t k = g * a.group; k < (g + 1) * a.group; ++k) to[k] = row.weight(k, scale, least);
        }
    } else if (a.source == CPMCU_OF_FLOAT32) {
        std::memcpy(to, from, sizeof(float) * cols);
    } else if (a.source == CPMCU_OF_BFLOAT16) {
        for (int64_t k = 0; k < cols; ++k) to[k] = to_float(load_as<bf16>(from + 2 * k));
    } else {
        for (int64_t k = 0; k < cols; ++k) to[k] = half_to_float(load_as<uint16_t>(from + 2 * k));
    }
    if (!a.through) return;
    for (int64_t k = 0; k < cols; ++k) {
        bf16 rounded;
        from_float(to[k], &rounded);
        to[k] = to_float(rounded);
    }
}

// Integer weights of one row, codes from 0 up, and their scales.
inline void quantise_row(const float *x, const cpmcu_matrix &m, uint8_t *codes, uint16_t *scales) {
    using P = Panel;
    const int most_code = m.kind == CPMCU_INT8 ? 127 : 8, zero = m.kind == CPMCU_INT8 ? 128 : 8;
    for (int64_t g = 0; g < m.cols / m.group; ++g) {
        const float *from = x + g * m.group;
        uint8_t *to = codes + g * m.group;
        auto largest = P::zero();
        bool odd = false;
        for (int i = 0; i < m.group; i += ROWS) {
            const auto value = P::load(from + i);
            odd = odd || P::any_nan(value);
            largest = P::max(largest, P::abs(value));
        }
        float most = 0.f;
        if (odd) {
            for (int i = 0; i < m.group; ++i) most = std::fabs(from[i]) > std::fabs(most) ? from[i] : most;
        } else {
            const float size = P::most(largest);
            int at = 0;
            while (std::fabs(from[at]) != size) ++at;
            most = from[at];
        }
        // Four bits reach from -8 to 7: the largest magnitude gets the -8. Eight bits are symmetric.
        const float wanted = m.kind == CPMCU_INT8 ? std::fabs(most) / most_code : -most / most_code;
        scales[g] = float_to_half(wanted);
        const float scale = half_to_float(scales[g]), inverse = scale != 0.f ? 1.f / scale : 0.f;
        const int exponent = scales[g] >> 10 & 31;
        if (!odd && exponent && exponent != 31) {  // no code is further from 0 than most_code
            int8_t near[128];
            for (int i = 0; i < m.group; i += ROWS) P::store_bytes(near + i, P::round(P::mul(P::load(from + i), P::set(inverse))));
            const int top = m.kind == CPMCU_INT8 ? 255 : 15;
            for (int i = 0; i < m.group; ++i) {
                const int code = near[i] + zero;
                to[i] = uint8_t(code > top ? top : code);
            }
            continue;
        }
        for (int i = 0; i < m.group; ++i) {
            float code = std::rint(from[i] * inverse) + zero;
            const float top = m.kind == CPMCU_INT8 ? 255.f : 15.f;
            code = code > top ? top : (code < 0.f ? 0.f : code);
            to[i] = uint8_t(code == code ? code : zero);
        }
    }
}

// Codes [cols] from 0 up into a lane: four columns are a word, of four bits eight.
inline void place_codes(const uint8_t *codes, const cpmcu_matrix &m, uint32_t *lane) {
    if (m.kind == CPMCU_INT8)
        for (int64_t k = 0; k < m.cols / 4; ++k) lane[k * ROWS] = load_as<uint32_t>(codes + 4 * k);
    else
        for (int64_t k = 0; k < m.cols / 8; ++k)
            lane[k * ROWS] = load_as<uint32_t>(codes + 8 * k) | load_as<uint32_t>(codes + 8 * k + 4) << 4;
}

// The same from what has codes of as many bits already.
inline void copy_codes(const CodedRow &row, const cpmcu_matrix &m, uint32_t *lane) {
    const char *from = row.codes;
    constexpr uint32_t LOW = 0x0f0f0f0f, SIGNS = 0x80808080;
    if (row.source == CPMCU_OF_Q4_0 || row.source == CPMCU_OF_Q4_1) {
        const int before = row.source == CPMCU_OF_Q4_0 ? 2 : 4;
        for (int64_t b = 0; b < m.cols / BLOCK; ++b, from += before + 16, lane += 4 * ROWS) {
            uint32_t q[4];
            std::memcpy(q, from + before, 16);
            lane[0] = (q[0] & LOW) | (q[1] & LOW) << 4;
            lane[ROWS] = (q[2] & LOW) | (q[3] & LOW) << 4;
            lane[2 * ROWS] = (q[0] >> 4 & LOW) | (q[1] & ~LOW);
            lane[3 * ROWS] = (q[2] >> 4 & LOW) | (q[3] & ~LOW);
        }
    } else if (row.source == CPMCU_OF_Q4_K) {
        for (int64_t g = 0; g < m.cols / BLOCK; ++g, lane += 4 * ROWS) {
            const char *q = row.block(g * BLOCK) + 16 + g % 8 / 2 * 32;
            const int half = g % 2 * 4;
            for (int j = 0; j < 4; ++j)
                lane[j * ROWS] = (load_as<uint32_t>(q + 8 * j) >> half & LOW) | (load_as<uint32_t>(q + 8 * j + 4) >> half & LOW) << 4;
        }
    } else if (row.source == CPMCU_OF_Q8_0) {
        for (int64_t b = 0; b < m.cols / BLOCK; ++b, from += 34)
            for (int i = 0; i < 8; ++i, lane += ROWS) *lane = load_as<uint32_t>(from + 2 + 4 * i) ^ SIGNS;
    } else if (row.source == CPMCU_OF_NIBBLES) {
        for (int64_t k = 0; k < m.cols / 8; ++k, from += 4, lane += ROWS) {
            // columns 1 0, 3 2, 5 4, 7 6 in the halves of four bytes become 4 0, 5 1, 6 2, 7 3
            const uint32_t q = load_as<uint32_t>(from), low = q & LOW, high = q >> 4 & LOW;
            *lane = (low & 0xff) | (high & 0xff) << 8 | (low & 0xff00) << 8 | (high & 0xff00) << 16
                | (low >> 16 & 0xff) << 4 | (high >> 16 & 0xff) << 12 | (low >> 24) << 20 | (high >> 24) << 28;
        }
    } else if (m.kind == CPMCU_INT8) {
        for (int64_t k = 0; k < m.cols / 4; ++k) lane[k * ROWS] = load_as<uint32_t>(from + 4 * k) ^ SIGNS;
    } else {
        for (int64_t k = 0; k < m.cols / 8; ++k) {
            const uint32_t a = load_as<uint32_t>(from + 8 * k), b = load_as<uint32_t>(from + 8 * k + 4);
            // -8 .. 7 plus 8: the fourth bit flips
            lane[k * ROWS] = ((a & LOW) ^ 0x08080808u) | ((b & LOW) ^ 0x08080808u) << 4;
        }
    }
}

inline int32_t lay_out(const cpmcu_lay_out_args &a, int32_t ith, int32_t nth) {
    const cpmcu_matrix &m = a.to;
    if (m.kind < CPMCU_FLOAT32 || m.kind > CPMCU_INT4 || m.cols > MOST_COLUMNS) return 1;
    if (a.source < CPMCU_OF_FLOAT32 || a.source > CPMCU_OF_Q4_K) return 1;
    const bool integers = m.kind >= CPMCU_INT8, coded = is_coded(a.source);
    if (integers && (m.group < BLOCK || m.group > 128 || m.group % BLOCK)) return 1;
    if (coded && (a.group < BLOCK || a.group % BLOCK || m.cols % a.group)) return 1;
    if (a.source == CPMCU_OF_Q4_K && m.cols % LARGE_BLOCK) return 1;
    const bool kept = coded && a.kept;
    if (kept && (!integers || a.group != m.group)) return 1;
    if (m.shifts && (m.kind != CPMCU_INT4 || !kept)) return 1;
    const int64_t groups = integers ? m.cols / m.group : 0, end = a.first + a.rows, half = a.heads ? a.rows / a.heads / 2 : 0;
    const int64_t last = end == m.rows ? panels_of(m) : (end + ROWS - 1) / ROWS;
    float x[MOST_COLUMNS];
    uint8_t codes[MOST_COLUMNS];
    uint16_t scales[MOST_COLUMNS / 8];
    for (int64_t p = a.first / ROWS + ith; p < last; p += nth) {
        char *panel = const_cast<char *>(static_cast<const char *>(m.data)) + p * panel_bytes(m);
        uint16_t *panel_scales = const_cast<uint16_t *>(m.scales) + p * groups * ROWS;
        uint16_t *panel_shifts = m.shifts ? const_cast<uint16_t *>(m.shifts) + p * groups * ROWS : nullptr;
        for (int lane = 0; lane < ROWS; ++lane) {
            const int64_t r = p * ROWS + lane;
            if (r < a.first || (r >= end && r < m.rows)) continue;  // of another call
            const bool real = r < m.rows;
            if (real) {
                int64_t at = r - a.first;
                if (half) at = at / (2 * half) * 2 * half + at % half * 2 + at / half % 2;
                const char *from = static_cast<const char *>(a.from) + at * a.row;
                const uint16_t *given = a.scales ? a.scales + at * (m.cols / a.group) : nullptr;
                if (coded) {
                    const CodedRow row{from, given, a.source, a.group};
                    for (int64_t g = 0; g < m.cols / a.group; ++g) {
                        const float scale = row.scale(g), least = row.shifted() ? row.least(g) : 0.f;
                        const uint16_t rounded = float_to_half(scale), shift = float_to_half(row.shifted() ? 8.f * scale + least : 0.f);
                        if (!is_finite_half(rounded) || !is_finite_half(shift)) return 2;
                        if (kept) panel_scales[g * ROWS + lane] = rounded;
                        if (panel_shifts) panel_shifts[g * ROWS + lane] = shift;
                    }
                    if (kept) {
                        copy_codes(row, m, reinterpret_cast<uint32_t *>(panel) + lane);
                        continue;
                    }
                }
                read_row(a, from, given, m.cols, x);
            } else {
                std::memset(x, 0, sizeof(float) * m.cols);
            }
            if (m.kind == CPMCU_FLOAT32) {
                for (int64_t k = 0; k < m.cols; ++k) reinterpret_cast<float *>(panel)[k * ROWS + lane] = x[k];
            } else if (m.kind == CPMCU_BFLOAT16) {
                for (int64_t k = 0; k < m.cols; ++k) from_float(x[k], reinterpret_cast<bf16 *>(panel) + (k / 2 * ROWS + lane) * 2 + k % 2);
            } else {
                quantise_row(x, m, codes, scales);
                place_codes(codes, m, reinterpret_cast<uint32_t *>(panel) + lane);
                for (int64_t g = 0; g < groups; ++g) {
                    panel_scales[g * ROWS + lane] = scales[g];
                    if (panel_shifts) panel_shifts[g * ROWS + lane] = 0;  // of rows that fill up a panel
                }
            }
        }
    }
    return 0;
}

}  // namespace NATIVE_LEVEL
}  // namespace native
