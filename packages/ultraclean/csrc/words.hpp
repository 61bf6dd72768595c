// fastText's words: separators, hash, vocabulary. The details are the library's; reference.py says them plainly.
#pragma once
#include <cstring>

#include "args.h"

namespace ultraclean {

constexpr uint64_t NGRAM_FACTOR = 116049371;

inline uint32_t word_hash(const uint8_t *word, int64_t length) {
    uint32_t h = 2166136261u;
    for (int64_t i = 0; i < length; ++i) h = (h ^ uint32_t(int8_t(word[i]))) * 16777619u;
    return h;
}

inline bool is_separator(uint8_t c) { return c == ' ' || (c >= 9 && c <= 13) || c == 0; }

inline bool is_end(const uint8_t *word, int64_t length) { return length == 4 && !std::memcmp(word, "</s>", 4); }

inline bool is_label(const uint8_t *word, int64_t length) { return length >= 9 && !std::memcmp(word, "__label__", 9); }

// Row of a word, or -1.
inline int32_t find(const ultraclean_model &m, const uint8_t *word, int64_t length, uint32_t hash) {
    const uint64_t mask = uint64_t(m.slot_count) - 1;
    // The low bits of FNV are good enough for a table that is a quarter full.
    for (uint64_t at = (hash ^ hash >> 15) & mask;; at = (at + 1) & mask) {
        const ultraclean_slot &slot = m.slots[at];
        if (slot.row < 0) return -1;
        if (slot.hash == hash && slot.length == length && !std::memcmp(m.words + slot.begin, word, length)) return slot.row;
    }
}

inline int32_t build_index(const ultraclean_index_args *a) {
    const uint64_t mask = uint64_t(a->slot_count) - 1;
    if (a->slot_count & mask || a->count * 2 > a->slot_count) return 1;
    for (int64_t i = 0; i < a->slot_count; ++i) a->slots[i].row = -1;
    for (int64_t row = 0; row < a->count; ++row) {
        const uint8_t *word = a->words + a->offsets[row];
        const int64_t length = a->offsets[row + 1] - a->offsets[row];
        const uint32_t hash = word_hash(word, length);
        uint64_t at = (hash ^ hash >> 15) & mask;
        while (a->slots[at].row >= 0) at = (at + 1) & mask;
        a->slots[at] = {hash, int32_t(row), uint32_t(a->offsets[row]), uint32_t(length)};
    }
    return 0;
}

// h mod d without a division: the estimate of the quotient from ⌊2⁶⁴/d⌋ is right or one too small.
struct Modulo {
    uint64_t divisor, inverse;
    explicit Modulo(uint64_t d) : divisor(d), inverse(d > 1 ? ~uint64_t(0) / d : 0) {}
    uint64_t operator()(uint64_t h) const {
        if (divisor == 1) return 0;
        const uint64_t rest = h - uint64_t((__uint128_t)h * inverse >> 64) * divisor;
        return rest >= divisor ? rest - divisor : rest;
    }
};

// Calls word(begin, length, hash) for each word of a document and true for its end mark last.
template <class Word> inline void each_word(const uint8_t *text, int64_t size, Word word) {
    int64_t i = 0;
    while (i < size) {
        while (i < size && is_separator(text[i])) ++i;
        const int64_t begin = i;
        uint32_t h = 2166136261u;
        for (; i < size && !is_separator(text[i]); ++i) h = (h ^ uint32_t(int8_t(text[i]))) * 16777619u;
        const int64_t length = i - begin;
        if (!length) break;
        if (text[begin] == '<' && is_end(text + begin, length)) break;
        if (text[begin] == '_' && is_label(text + begin, length)) continue;
        word(text + begin, length, h);
    }
    static const uint8_t end[] = {'<', '/', 's', '>'};
    word(end, 4, word_hash(end, 4));
}

}  // namespace ultraclean
