// The C interface: picks the level once and hands on. The only file compiled for any processor.
#include "backward.hpp"
#include "cpu_level.hpp"
#include "parallel.hpp"
#include "run.hpp"

using namespace native;

extern "C" {
int32_t infllm2_level(void) {
    static const Level level = chosen_level("INFLLM2_CPU_LEVEL");
    return level;
}
const char *infllm2_level_name(int32_t level) { return level_name(level); }

#define ENTRY(name, args)                                                                                    \
    NATIVE_DECLARE(infllm2_##name##_, args)                                                                  \
    int32_t infllm2_##name(const args *a, int32_t ith, int32_t nth) {                                        \
        static int32_t (*const levels[])(const args *, int32_t, int32_t) = NATIVE_LEVELS(infllm2_##name##_); \
        return levels[infllm2_level()](a, ith, nth);                                                         \
    }
ENTRY(select, infllm2_select_args)
ENTRY(attend, infllm2_attend_args)
ENTRY(merge, infllm2_attend_args)
ENTRY(run, infllm2_run_args)
ENTRY(backward, infllm2_backward_args)
ENTRY(gather, infllm2_backward_args)
ENTRY(compress, infllm2_compress_args)

int32_t infllm2_append(const infllm2_append_args *a, int32_t ith, int32_t nth) {
    if (a->dtype != 0 && a->dtype != 1) return 1;
    const int64_t size = a->dtype ? 2 : 4;
    for (int64_t i = ith; i < a->batch * a->heads * a->rows; i += nth) {
        const int64_t b = i / a->rows / a->heads, h = i / a->rows % a->heads, t = i % a->rows;
        const auto copy = [&](const infllm2_tensor &from, const infllm2_tensor &to) {
            std::memcpy(static_cast<char *>(const_cast<void *>(to.data)) + (b * to.batch + h * to.head + (a->at + t) * to.row) * size,
                        static_cast<const char *>(from.data) + (b * from.batch + h * from.head + t * from.row) * size, a->dim * size);
        };
        copy(a->new_k, a->k);
        copy(a->new_v, a->v);
    }
    return 0;
}

int32_t infllm2_steps(ParallelFor pool, const Step *steps, int32_t count) { return run_steps(pool, steps, count); }
int32_t infllm2_parallel(ParallelFor pool, Operation operation, const void *args, int32_t nth) {
    return run_on(pool, operation, args, nth);
}

// Sizes do not depend on the level.
int64_t infllm2_select_work(const infllm2_shape *s, const infllm2_selection *c) {
    return select_run_work(s, c);
}
int64_t infllm2_attend_work(const infllm2_shape *s, int64_t block_size) { return round_up(attend_work(s, block_size), 64); }
int64_t infllm2_backward_work(const infllm2_shape *s, int64_t block_size) { return round_up(backward_work(s, block_size), 64); }
int64_t infllm2_gradient_floats(const infllm2_shape *s) { return gradient_floats(s); }
int64_t infllm2_partial_floats(const infllm2_shape *s) { return partial_floats(s); }
}
