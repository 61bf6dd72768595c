// Stochastic gradient descent on a classifier of width one; width_one.py says why that is enough, and is the reference.
// A batch is read and judged by all threads, document by document; then each thread adds what follows to its own rows.
// A row's changes come in the order of the documents and the output's in one sum, so the number of threads changes nothing.
#pragma once
#include <cmath>
#include <sched.h>

#include "ngrams.hpp"

namespace ultraclean {

// All threads wait for the last: barrier[0] counts who has come, barrier[1] how often all had.
inline void wait_for_all(int32_t *barrier, int32_t nth) {
    if (nth == 1) return;
    const int32_t round = __atomic_load_n(barrier + 1, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(barrier, 1, __ATOMIC_ACQ_REL) == nth) {
        __atomic_store_n(barrier, 0, __ATOMIC_RELAXED);
        __atomic_store_n(barrier + 1, round + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int32_t spins = 0; __atomic_load_n(barrier + 1, __ATOMIC_ACQUIRE) == round; ++spins) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        if (spins > 1000) sched_yield();
    }
}

// Rows of a document, sorted by share of the table, and their mean.
class Reader {
  public:
    explicit Reader(const ultraclean_train_args *a)
        : a(a), ngrams(a->table + a->vocabulary, a->bucket, a->ngrams), mask(uint32_t(a->shares) - 1) {}

    // `lists`: shares · `room` rows; `counts`: how many each share got. Returns the mean, 0 without any row.
    double mean(const int32_t *tokens, int64_t size, uint32_t *lists, int64_t room, int64_t *counts, int64_t &found) {
        total = 0, all = 0;
        for (uint32_t s = 0; s <= mask; ++s) counts[s] = 0;
        const auto put = [&](uint32_t row) {
            const uint32_t share = row >> LINE & mask;  // a cache line has one owner
            lists[share * room + counts[share]++] = row;
        };
        const auto each = [&](const uint32_t *rows, int64_t some) {
            total += sum_of(a->table + a->vocabulary, rows, some);
            for (int64_t i = 0; i < some; ++i) put(uint32_t(a->vocabulary) + rows[i]);
            all += some;
        };
        ngrams.begin();
        for (int64_t i = 0; i < size; ++i) {
            const ultraclean_feature feature = a->features[tokens[i]];
            if (feature.row >= 0) total += a->table[feature.row], put(uint32_t(feature.row)), ++all;
            ngrams.add(feature.hash, each);
        }
        ngrams.flush(each);
        found = all;
        return all ? total / double(all) : 0.0;
    }

  private:
    static constexpr uint32_t LINE = 4;  // 16 rows
    const ultraclean_train_args *a;
    Ngrams ngrams;
    const uint32_t mask;
    double total;
    int64_t all;
};

inline int32_t train(const ultraclean_train_args *a, int32_t ith, int32_t nth) {
    if (a->shares & (a->shares - 1) || a->shares < nth) return 1;
    Reader reader(a);
    ultraclean_progress p = *a->progress;  // each thread's own copy, all equal
    wait_for_all(a->barrier, nth);
    while (p.document < a->until && !p.diverged) {
        const int64_t first = p.document;
        const int64_t size = a->documents - first < a->batch ? a->documents - first : a->batch;
        const double rate = a->lr * (1.0 - double(p.tokens) / double(a->total));
        const auto start = [&](int64_t i) { return a->starts[first + i]; };
        const auto lists = [&](int64_t i) { return a->rows + a->shares * a->ngrams * (start(i) - start(0)); };
        const auto room = [&](int64_t i) { return a->ngrams * (start(i + 1) - start(i)); };
        for (int64_t i = ith; i < size; i += nth) {
            int64_t found;
            const double hidden = reader.mean(a->tokens + start(i), start(i + 1) - start(i), lists(i), room(i),
                                              a->counts + i * a->shares, found);
            const double share = 1.0 / (1.0 + std::exp(-p.output * hidden));
            const double activity = found ? rate * (double(a->good[first + i]) - share) : 0.0;
            a->steps[i] = {hidden, activity, found ? float(activity * p.output / double(found)) : 0.0f};
        }
        wait_for_all(a->barrier, nth);
        for (int64_t i = 0; i < size; ++i) {
            const float step = a->steps[i].step;
            for (int32_t s = ith; s < a->shares; s += nth) {
                const uint32_t *rows = lists(i) + s * room(i);
                for (int64_t k = 0, count = a->counts[i * a->shares + s]; k < count; ++k) a->table[rows[k]] += step;
            }
        }
        double change = 0;
        for (int64_t i = 0; i < size; ++i) change += a->steps[i].activity * a->steps[i].hidden;
        p.output += 2.0 * change;
        p.diverged = !std::isfinite(p.output) || !(std::fabs(p.output) < 1e15);
        p.tokens += start(size) - start(0);
        p.document += size;
        wait_for_all(a->barrier, nth);
    }
    if (!ith) *a->progress = p;
    return 0;
}

}  // namespace ultraclean
