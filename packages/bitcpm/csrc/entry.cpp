// The C interface: picks the level once and hands on. The only file compiled for any processor.
#include "cpu_level.hpp"
#include "parallel.hpp"
#include "relayout.hpp"

using namespace native;

extern "C" {
int32_t bitcpm_level(void) {
    static const Level level = chosen_level("BITCPM_CPU_LEVEL");
    return level;
}
const char *bitcpm_level_name(int32_t level) { return level_name(level); }

#define ENTRY(name, args)                                                                                   \
    NATIVE_DECLARE(bitcpm_##name##_, args)                                                                  \
    int32_t bitcpm_##name(const args *a, int32_t ith, int32_t nth) {                                        \
        static int32_t (*const levels[])(const args *, int32_t, int32_t) = NATIVE_LEVELS(bitcpm_##name##_); \
        return levels[bitcpm_level()](a, ith, nth);                                                         \
    }
ENTRY(prepare, bitcpm_prepare_args)
ENTRY(multiply, bitcpm_multiply_args)

int32_t bitcpm_lay_out(const bitcpm_layout_args *a, int32_t ith, int32_t nth) { return bitcpm::lay_out(a, ith, nth); }
int32_t bitcpm_take_out(const bitcpm_layout_args *a, int32_t ith, int32_t nth) { return bitcpm::take_out(a, ith, nth); }

int32_t bitcpm_parallel(ParallelFor pool, Operation operation, const void *args, int32_t nth) {
    return run_on(pool, operation, args, nth);
}

int64_t bitcpm_weight_bytes(const bitcpm_shape *s) { return bitcpm::blocks_of(*s) * bitcpm::block_bytes(*s); }
int64_t bitcpm_prepared_bytes(const bitcpm_shape *s, int64_t tokens, int32_t mode) {
    return bitcpm::Prepared(*s, tokens, mode).bytes;
}
int64_t bitcpm_work_bytes(const bitcpm_shape *s, int64_t tokens) {
    return bitcpm::Work(*s, tokens, bitcpm_level() >= AVX512_VNNI).bytes;
}
}
