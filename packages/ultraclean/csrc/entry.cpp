// The C interface: hands on, and picks the instruction level once.
#include "bpe.hpp"
#include "cpu_level.hpp"
#include "minhash.hpp"
#include "train.hpp"
#include "vocabulary.hpp"

using namespace ultraclean;
using namespace native;

extern "C" {
#define DECLARE(level) \
    void ultraclean_minima_##level(const uint64_t *, int64_t, const uint64_t *, const uint64_t *, int64_t, uint32_t *);
DECLARE(scalar)
DECLARE(avx2)
DECLARE(avx512)
DECLARE(avx512_vnni)

int32_t ultraclean_level(void) {
    static const Level level = chosen_level("ULTRACLEAN_CPU_LEVEL");
    return level;
}
const char *ultraclean_level_name(int32_t level) { return level_name(level); }

int64_t ultraclean_cache_bytes(void) { return (sizeof(Cache) + 63) / 64 * 64; }

int32_t ultraclean_index(const ultraclean_index_args *a, int32_t ith, int32_t) { return ith ? 0 : build_index(a); }
int32_t ultraclean_score(const ultraclean_score_args *a, int32_t ith, int32_t nth) { return score(a, ith, nth); }
int32_t ultraclean_words(const ultraclean_words_args *a, int32_t ith, int32_t) { return ith ? 0 : words(a); }
int32_t ultraclean_count(const ultraclean_count_args *a, int32_t ith, int32_t) { return ith ? 0 : count(a); }
int32_t ultraclean_merge(const ultraclean_merge_args *a, int32_t ith, int32_t) { return ith ? 0 : merge(a); }
int32_t ultraclean_train(const ultraclean_train_args *a, int32_t ith, int32_t) { return ith ? 0 : train(a); }
int32_t ultraclean_exact(const ultraclean_exact_args *a, int32_t ith, int32_t nth) { return exact(a, ith, nth); }

int32_t ultraclean_minhash(const ultraclean_minhash_args *a, int32_t ith, int32_t nth) {
    static const Minima levels[] = NATIVE_LEVELS(ultraclean_minima_);
    return minhash(a, ith, nth, levels[ultraclean_level()]);
}
}
