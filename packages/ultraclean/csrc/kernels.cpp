// Compiled once for each instruction level, with that level's flags and NATIVE_LEVEL: what wide registers make faster.
// Scoring waits for memory and for branches and gains nothing from them, so it is in entry.cpp alone.
#include <cstdint>

#define JOIN(a, b) a##b
#define NAME(prefix, level) JOIN(prefix, level)

extern "C" void NAME(ultraclean_minima_, NATIVE_LEVEL)(const uint64_t *grams, int64_t count, const uint64_t *a,
                                                       const uint64_t *b, int64_t hashes, uint32_t *least) {
    constexpr int64_t BLOCK = 64;
    for (int64_t first = 0; first < hashes; first += BLOCK) {
        const int64_t width = hashes - first < BLOCK ? hashes - first : BLOCK;
        // The upper halves order as the whole numbers do, so the minimum is cut only at the end.
        uint64_t factor[BLOCK] = {}, offset[BLOCK] = {}, minimum[BLOCK];
        for (int64_t k = 0; k < width; ++k) factor[k] = a[first + k], offset[k] = b[first + k];
        for (int64_t k = 0; k < BLOCK; ++k) minimum[k] = ~uint64_t(0);
        for (int64_t i = 0; i < count; ++i) {
            const uint64_t h = grams[i];
            for (int64_t k = 0; k < BLOCK; ++k) {
                const uint64_t v = factor[k] * h + offset[k];
                minimum[k] = v < minimum[k] ? v : minimum[k];
            }
        }
        for (int64_t k = 0; k < width; ++k) least[first + k] = uint32_t(minimum[k] >> 32);
    }
}
