// The n-grams of a document's words, hashed; the minima over them are in kernels.cpp, where wide registers pay.
#pragma once
#include "fold.hpp"
#include "words.hpp"

namespace ultraclean {

using Minima = void (*)(const uint64_t *grams, int64_t count, const uint64_t *a, const uint64_t *b, int64_t hashes,
                        uint32_t *least);

// Two rounds of multiply and fold: every bit of a word's hash depends on every bit of the word.
inline uint64_t mix(uint64_t x, uint64_t y) {
    const __uint128_t product = (__uint128_t)(x ^ 0x9e3779b97f4a7c15ull) * (y ^ 0xd6e8feb86659fd93ull);
    return uint64_t(product) ^ uint64_t(product >> 64);
}

inline uint64_t hash64(const uint8_t *word, int64_t length) {
    uint64_t h = uint64_t(length) + 1;
    for (; length > 0; word += 8, length -= 8) {
        uint64_t part = 0;
        std::memcpy(&part, word, length < 8 ? length : 8);
        h = mix(h, part);
    }
    return mix(h, 0xa0761d6478bd642full);
}

inline int32_t minhash(const ultraclean_minhash_args *args, int32_t ith, int32_t nth, Minima minima) {
    uint8_t *folded = args->work + ith * args->work_stride;
    for (int64_t doc = ith; doc < args->documents; doc += nth) {
        const int64_t begin = args->offsets[doc], given = args->offsets[doc + 1] - begin;
        const int64_t size = fold(*args->fold, args->text + begin, given, folded);
        if (size < 0) return 1;
        uint64_t *words = reinterpret_cast<uint64_t *>(folded + (given * args->expansion + 127) / 64 * 64);
        int64_t count = 0;
        uint64_t content = 0;
        for (int64_t i = 0; i < size;) {
            while (i < size && folded[i] == ' ') ++i;
            const int64_t from = i;
            while (i < size && folded[i] != ' ') ++i;
            if (i == from) break;
            words[count++] = hash64(folded + from, i - from);
            content = mix(content, words[count - 1]);
        }
        args->content[doc] = content;
        // A shorter document is one n-gram of all its words.
        const int64_t n = count < args->ngrams ? count : args->ngrams, grams = count ? count - n + 1 : 0;
        for (int64_t i = 0; i < grams; ++i) {
            uint64_t h = uint64_t(n);
            for (int64_t k = 0; k < n; ++k) h = mix(h, words[i + k]);
            words[i] = h;
        }
        if (args->grams) {
            if (grams > 2 * given + 1) return 2;
            std::memcpy(args->grams + 2 * begin + doc, words, grams * sizeof *words);
            args->gram_count[doc] = count < args->ngrams ? 0 : grams;  // a shorter one proves nothing
            continue;
        }
        minima(words, grams, args->a, args->b, args->hashes, args->signatures + doc * args->hashes);
    }
    return 0;
}

}  // namespace ultraclean
