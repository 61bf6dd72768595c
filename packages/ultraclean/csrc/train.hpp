// Stochastic gradient descent on a classifier of width one; width_one.py says why that is enough, and is the reference.
// One thread: a step follows from the one before, and has a few microseconds of work.
#pragma once
#include <cmath>

#include "ngrams.hpp"

namespace ultraclean {

inline int32_t train(const ultraclean_train_args *a) {
    float *grams = a->table + a->vocabulary;
    Ngrams ngrams(grams, a->bucket, a->ngrams);
    ultraclean_progress p = *a->progress;
    for (; p.document < a->until && !p.diverged; ++p.document) {
        const int32_t *tokens = a->tokens + a->starts[p.document];
        const int64_t size = a->starts[p.document + 1] - a->starts[p.document];
        const double rate = a->lr * (1.0 - double(p.tokens) / double(a->total));
        p.tokens += size;
        double sum = 0;
        int64_t count = 0;
        const auto each = [&](const uint32_t *rows, int64_t found) {
            sum += sum_of(grams, rows, found);
            for (int64_t i = 0; i < found; ++i) a->rows[count + i] = uint32_t(a->vocabulary) + rows[i];
            count += found;
        };
        ngrams.begin();
        for (int64_t i = 0; i < size; ++i) {
            const ultraclean_feature feature = a->features[tokens[i]];
            if (feature.row >= 0) sum += a->table[feature.row], a->rows[count++] = uint32_t(feature.row);
            ngrams.add(feature.hash, each);
        }
        ngrams.flush(each);
        if (!count) continue;
        const double hidden = sum / double(count);
        const double share = 1.0 / (1.0 + std::exp(-p.output * hidden));
        const double activity = rate * (double(a->good[p.document]) - share);
        const float step = float(activity * p.output / double(count));
        for (int64_t i = 0; i < count; ++i) a->table[a->rows[i]] += step;
        p.output += 2.0 * activity * hidden;
        p.diverged = !(std::fabs(p.output) < 1e15);
    }
    *a->progress = p;
    return 0;
}

}  // namespace ultraclean
