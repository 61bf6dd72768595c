// Code point by code point: lower case, compatibility decomposition, marks dropped, as a table of Python's making says.
#pragma once
#include <cstring>

#include "args.h"

namespace ultraclean {

// The code point at text[i] and its length; text is valid UTF-8.
inline uint32_t decode(const uint8_t *text, int &length) {
    const uint8_t c = text[0];
    if (c < 0x80) return length = 1, c;
    if (c < 0xe0) return length = 2, uint32_t(c & 31) << 6 | (text[1] & 63);
    if (c < 0xf0) return length = 3, uint32_t(c & 15) << 12 | uint32_t(text[1] & 63) << 6 | (text[2] & 63);
    length = 4;
    return uint32_t(c & 7) << 18 | uint32_t(text[1] & 63) << 12 | uint32_t(text[2] & 63) << 6 | (text[3] & 63);
}

inline bool python_space(uint32_t c) {
    return c == ' ' || (c >= 9 && c <= 13) || (c >= 0x1c && c <= 0x1f) || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

// Where the text begins and ends without Python's white space around it.
inline void trim(const uint8_t *&text, int64_t &size) {
    int length;
    while (size && python_space(decode(text, length))) text += length, size -= length;
    while (size) {
        int64_t at = size - 1;
        while (at && (text[at] & 0xc0) == 0x80) --at;
        if (!python_space(decode(text + at, length))) break;
        size = at;
    }
}

constexpr uint32_t SLOW = 0xff;  // as a length: depends on the neighbours, left to Python

// Bytes written; -1 if a character is left to Python.
inline int64_t fold(const ultraclean_fold &f, const uint8_t *text, int64_t size, uint8_t *out) {
    const uint32_t *ascii = f.entries + int64_t(f.pages[0]) * 256;
    // One byte to one byte, which is nearly all of English; 0 where it is more.
    uint8_t quick[128];
    for (int c = 0; c < 128; ++c) {
        const uint32_t e = ascii[c];
        quick[c] = e == 0 ? uint8_t(c) : (e >> 24) == 1 ? f.text[e & 0x7fffff] : 0;
    }
    if (f.newlines) quick['\n'] = 0;
    uint8_t *o = out;
    int64_t i = 0, run = 0;
    while (i < size) {
        const uint8_t c = text[i];
        if (c < 0x80 && quick[c]) {
            *o++ = quick[c], ++i, run = 0;
            continue;
        }
        int length;
        const uint32_t point = decode(text + i, length);
        const uint32_t e = f.entries[int64_t(f.pages[point >> 8]) * 256 + (point & 255)];
        if (c == '\n' && f.newlines && ++run > f.newlines) {
            ++i;
            continue;
        }
        if (c != '\n') run = 0;
        if (!e) {
            for (int k = 0; k < length; ++k) *o++ = text[i + k];
        } else {
            const uint32_t count = e >> 24;
            if (count == SLOW) return -1;
            const uint8_t *from = f.text + (e & 0x7fffff);
            for (uint32_t k = 0; k < count; ++k) *o++ = from[k];
        }
        i += length;
    }
    return o - out;
}

}  // namespace ultraclean
