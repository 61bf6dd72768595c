// The mean of a document's scalars: its logit. Words come in one by one, n-grams in blocks.
#pragma once
#include <cmath>
#include <limits>

#include "ngrams.hpp"

namespace ultraclean {

class Sum {
  public:
    explicit Sum(const ultraclean_model &m) : model(m), ngrams(m.table + m.vocabulary, m.bucket, m.ngrams) {}

    void begin() { total = 0, count = 0, words = 0, ngrams.begin(); }

    void add(uint32_t hash, float scalar, bool has_row) {
        total += has_row ? double(scalar) : 0.0;
        count += has_row;
        ++words;
        ngrams.add(hash, [this](const uint32_t *rows, int64_t found) { add_grams(rows, found); });
    }

    void add_word(const uint8_t *word, int64_t length, uint32_t hash) {
        const int32_t row = find(model, word, length, hash);
        const float scalar = row < 0 ? 0.0f : model.table[row];
        add(hash, scalar, row >= 0 && !(model.pruned && std::isnan(scalar)));
    }

    double finish() {
        ngrams.flush([this](const uint32_t *rows, int64_t found) { add_grams(rows, found); });
        return count ? total / double(count) : std::numeric_limits<double>::quiet_NaN();
    }

    int64_t words;

  private:
    const ultraclean_model &model;
    Ngrams ngrams;
    double total;
    int64_t count;

    void add_grams(const uint32_t *rows, int64_t found) {
        const float *grams = model.table + model.vocabulary;
        if (!model.pruned) {
            total += sum_of(grams, rows, found);
            count += found;
            return;
        }
        double sum = 0;
        for (int64_t i = 0; i < found; ++i)
            if (const float s = grams[rows[i]]; !std::isnan(s)) sum += s, ++count;
        total += sum;
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
