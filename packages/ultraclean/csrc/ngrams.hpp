// Word n-grams, formed in blocks, so that their rows, scattered over a table larger than the inner caches, are fetched
// many at a time.
#pragma once
#include "words.hpp"

namespace ultraclean {

// Sum of some rows: four at a time, or each addition would wait for the one before.
inline double sum_of(const float *table, const uint32_t *rows, int64_t count) {
    double sums[4] = {0, 0, 0, 0};
    int64_t i = 0;
    for (; i + 4 <= count; i += 4)
        for (int k = 0; k < 4; ++k) sums[k] += table[rows[i + k]];
    for (; i < count; ++i) sums[0] += table[rows[i]];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

class Ngrams {
  public:
    // `grams`: the n-grams' part of the table, [bucket].
    Ngrams(const float *grams, int64_t bucket, int32_t longest)
        : grams(grams), bucket(bucket), longest(longest), modulo(uint64_t(bucket)) {}

    void begin() { held = 0, before = 0; }

    // `each(rows, count)` gets the rows of a block's n-grams, length by length, all of them asked for from memory.
    template <class Each> void add(uint32_t hash, Each each) {
        // The library keeps hashes as signed 32-bit integers: the sign extends.
        hashes[before + held] = uint64_t(int64_t(int32_t(hash)));
        if (++held == BLOCK) flush(each);
    }

    // All n-grams that end in the block; `before` words in front of it belong to the one before.
    template <class Each> void flush(Each each) {
        const int64_t all = before + held;
        if (bucket) {
            std::memcpy(chain, hashes, all * sizeof *hashes);
            for (int64_t n = 2; n <= longest && n <= all; ++n) {
                // chain[i] is the n-gram that begins at i.
                const int64_t first = before >= n - 1 ? before - (n - 1) : 0;
                for (int64_t i = 0; i + n <= all; ++i) chain[i] = chain[i] * NGRAM_FACTOR + hashes[i + n - 1];
                const int64_t found = all - n + 1;
                for (int64_t i = first; i < found; ++i) {
                    rows[i] = uint32_t(modulo(chain[i]));
                    __builtin_prefetch(grams + rows[i]);
                }
                each(rows + first, found - first);
            }
        }
        const int64_t keep = all < longest - 1 ? all : longest - 1;
        std::memmove(hashes, hashes + all - keep, keep * sizeof *hashes);
        before = keep, held = 0;
    }

  private:
    static constexpr int64_t BLOCK = 128, MOST = 16;  // MOST: longest n-gram
    const float *grams;
    const int64_t bucket, longest;
    const Modulo modulo;
    int64_t held, before;
    uint64_t hashes[BLOCK + MOST], chain[BLOCK + MOST];
    uint32_t rows[BLOCK + MOST];
};

}  // namespace ultraclean
