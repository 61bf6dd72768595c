// Which words training text has, how often, and the text as numbers of words.
#pragma once
#include "fold.hpp"
#include "words.hpp"

namespace ultraclean {

inline int32_t words(const ultraclean_words_args *a) {
    uint8_t *out = a->out;
    for (int64_t document = 0; document < a->documents; ++document) {
        const uint8_t *text = a->folded;
        int64_t size = fold(*a->fold, a->text + a->offsets[document], a->offsets[document + 1] - a->offsets[document], a->folded);
        a->sizes[document] = -1;
        if (size < 0) continue;
        if (a->fold->trim) trim(text, size);
        const uint8_t *begin = out;
        each_word(text, size, [&](const uint8_t *word, int64_t length, uint32_t) {
            if (is_end(word, length)) return;
            if (out != begin) *out++ = ' ';
            std::memcpy(out, word, length);
            out += length;
        });
        a->sizes[document] = out - begin;
    }
    return 0;
}

class Types {
  public:
    explicit Types(const ultraclean_count_args *a) : a(a), mask(uint64_t(a->slot_count) - 1), used(a->state[1]) {
        if (a->rebuild)
            for (int64_t i = 1; i < used; ++i) a->slots[empty_slot(a->types[i].hash)] = slot_of(a->types[i].hash, i);
        if (!used) a->types[used++] = {-1, 0, 0, 4};
    }

    bool has_room(int64_t more) const { return (used + more) * 2 <= a->slot_count && used + more <= a->type_room; }

    int32_t number_of(const uint8_t *word, int64_t length, uint32_t hash) {
        for (uint64_t at = first_slot(hash);; at = (at + 1) & mask) {
            const uint64_t slot = a->slots[at];
            if (!slot) {
                a->slots[at] = slot_of(hash, used);
                a->types[used] = {word - a->text, 0, hash, int32_t(length)};
                return int32_t(used++);
            }
            if (uint32_t(slot >> 32) != hash) continue;
            const ultraclean_type &type = a->types[uint32_t(slot)];
            if (type.length == length && !std::memcmp(a->text + type.begin, word, length)) return int32_t(uint32_t(slot));
        }
    }

    void save() { a->state[1] = used; }

  private:
    const ultraclean_count_args *a;
    const uint64_t mask;
    int64_t used;

    uint64_t first_slot(uint32_t hash) const { return (hash ^ hash >> 15) & mask; }
    uint64_t empty_slot(uint32_t hash) const {
        uint64_t at = first_slot(hash);
        while (a->slots[at]) at = (at + 1) & mask;
        return at;
    }
    static uint64_t slot_of(uint32_t hash, int64_t type) { return uint64_t(hash) << 32 | uint64_t(type); }
};

inline int32_t count(const ultraclean_count_args *a) {
    if (a->slot_count & (a->slot_count - 1)) return 1;
    Types types(a);
    int64_t &document = a->state[0], &tokens = a->state[2];
    for (; document < a->documents; ++document) {
        const int64_t begin = a->offsets[document], size = a->offsets[document + 1] - begin;
        if (!types.has_room(size / 2 + 2)) break;
        const int64_t before = tokens;
        each_word(a->text + begin, size, [&](const uint8_t *word, int64_t length, uint32_t hash) {
            const bool end = is_end(word, length);
            const int32_t type = end ? 0 : types.number_of(word, length, hash);
            if (end) a->types[0].hash = hash;
            ++a->types[type].count;
            a->tokens[tokens++] = type;
        });
        a->lengths[document] = tokens - before;
    }
    types.save();
    return 0;
}

inline int32_t merge(const ultraclean_merge_args *m) {
    Types types(&m->into);
    if (!types.has_room(m->count)) return 1;
    for (int64_t i = 0; i < m->count; ++i) {
        const ultraclean_type &type = m->types[i];
        const int32_t number = i ? types.number_of(m->into.text + type.begin, type.length, type.hash) : 0;
        m->into.types[number].count += type.count;
        m->becomes[i] = number;
    }
    types.save();
    return 0;
}

}  // namespace ultraclean
