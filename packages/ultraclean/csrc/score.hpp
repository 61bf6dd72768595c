// The mean of a document's scalars: its logit. Words come in one by one; n-grams are formed in blocks, so that their
// rows, scattered over a table larger than the inner caches, are fetched many at a time.
#pragma once
#include <cmath>
#include <limits>

#include "words.hpp"

namespace ultraclean {

class Sum {
  public:
    explicit Sum(const ultraclean_model &m) : model(m), modulo(uint64_t(m.bucket)) {}

    void begin() { total = 0, count = 0, held = 0, before = 0, words = 0; }

    void add(uint32_t hash, float scalar, bool has_row) {
        total += has_row ? double(scalar) : 0.0;
        count += has_row;
        // The library keeps hashes as signed 32-bit integers: the sign extends.
        hashes[before + held] = uint64_t(int64_t(int32_t(hash)));
        ++words;
        if (++held == BLOCK) flush();
    }

    void add_word(const uint8_t *word, int64_t length, uint32_t hash) {
        const int32_t row = find(model, word, length, hash);
        const float scalar = row < 0 ? 0.0f : model.table[row];
        add(hash, scalar, row >= 0 && !(model.pruned && std::isnan(scalar)));
    }

    double finish() {
        flush();
        return count ? total / double(count) : std::numeric_limits<double>::quiet_NaN();
    }

    int64_t words;

  private:
    static constexpr int64_t BLOCK = 128, MOST = 16;  // MOST: longest n-gram
    const ultraclean_model &model;
    const Modulo modulo;
    double total;
    int64_t count, held, before;
    uint64_t hashes[BLOCK + MOST], chain[BLOCK + MOST];
    uint32_t rows[BLOCK + MOST];

    // All n-grams that end in the block; `before` words in front of it belong to the one before.
    void flush() {
        const int64_t all = before + held;
        const float *grams = model.table + model.vocabulary;
        if (model.bucket) {
            std::memcpy(chain, hashes, all * sizeof *hashes);
            for (int64_t n = 2; n <= model.ngrams && n <= all; ++n) {
                // chain[i] is the n-gram that begins at i.
                const int64_t first = before >= n - 1 ? before - (n - 1) : 0;
                for (int64_t i = 0; i + n <= all; ++i) chain[i] = chain[i] * NGRAM_FACTOR + hashes[i + n - 1];
                const int64_t found = all - n + 1;
                for (int64_t i = first; i < found; ++i) {
                    rows[i] = uint32_t(modulo(chain[i]));
                    __builtin_prefetch(grams + rows[i]);
                }
                double sums[4] = {0, 0, 0, 0};
                if (model.pruned) {
                    for (int64_t i = first; i < found; ++i)
                        if (const float s = grams[rows[i]]; !std::isnan(s)) sums[0] += s, ++count;
                } else {
                    int64_t i = first;
                    for (; i + 4 <= found; i += 4)
                        for (int k = 0; k < 4; ++k) sums[k] += grams[rows[i + k]];
                    for (; i < found; ++i) sums[0] += grams[rows[i]];
                    count += found - first;
                }
                total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
            }
        }
        const int64_t keep = all < model.ngrams - 1 ? all : model.ngrams - 1;
        std::memmove(hashes, hashes + all - keep, keep * sizeof *hashes);
        before = keep, held = 0;
    }
};

inline void score_words(Sum &sum, const uint8_t *text, int64_t size) {
    each_word(text, size, [&](const uint8_t *word, int64_t length, uint32_t hash) { sum.add_word(word, length, hash); });
}

// fastText's sum, product and softmax in its own order and precision.
inline int32_t exact(const ultraclean_exact_args *a, int32_t ith, int32_t nth) {
    const ultraclean_model &m = a->model;
    const Modulo modulo(uint64_t(m.bucket));
    const char *input = reinterpret_cast<const char *>(a->input), *output = reinterpret_cast<const char *>(a->output);
    uint8_t *work = a->work + ith * a->work_stride;
    float *hidden = reinterpret_cast<float *>(work), *row = hidden + a->dim, *logits = row + a->dim;
    uint64_t *hashes = reinterpret_cast<uint64_t *>(work + ((2 * a->dim + a->labels) * 4 + 63) / 64 * 64);
    const auto add = [&](int64_t which) {
        std::memcpy(row, input + which * a->dim * 4, a->dim * 4);
        for (int64_t d = 0; d < a->dim; ++d) hidden[d] += row[d];
    };
    for (int64_t doc = ith; doc < a->documents; doc += nth) {
        int64_t words = 0, count = 0;
        std::memset(hidden, 0, a->dim * 4);
        each_word(a->text + a->offsets[doc], a->offsets[doc + 1] - a->offsets[doc],
                  [&](const uint8_t *word, int64_t length, uint32_t hash) {
                      hashes[words++] = uint64_t(int64_t(int32_t(hash)));
                      if (const int32_t at = find(m, word, length, hash); at >= 0) add(at), ++count;
                  });
        for (int64_t i = 0; m.bucket && i < words; ++i) {
            uint64_t h = hashes[i];
            for (int64_t j = i + 1; j < words && j < i + m.ngrams; ++j) {
                h = h * NGRAM_FACTOR + hashes[j];
                add(m.vocabulary + int64_t(modulo(h))), ++count;
            }
        }
        float *probabilities = a->hidden + doc * a->labels;
        if (!count) {
            for (int64_t k = 0; k < a->labels; ++k) probabilities[k] = std::numeric_limits<float>::quiet_NaN();
            continue;
        }
        const float scale = float(1.0 / double(count));
        for (int64_t d = 0; d < a->dim; ++d) hidden[d] *= scale;
        float most = 0, z = 0;
        for (int64_t k = 0; k < a->labels; ++k) {
            std::memcpy(row, output + k * a->dim * 4, a->dim * 4);
            float dot = 0;
            for (int64_t d = 0; d < a->dim; ++d) dot += row[d] * hidden[d];
            logits[k] = dot;
            if (!k || dot > most) most = dot;
        }
        for (int64_t k = 0; k < a->labels; ++k) z += logits[k] = float(std::exp(double(logits[k] - most)));
        for (int64_t k = 0; k < a->labels; ++k) {
            const float share = logits[k] / z;
            probabilities[k] = std::exp(float(std::log(double(share) + 1e-5)));
        }
    }
    return 0;
}

}  // namespace ultraclean
