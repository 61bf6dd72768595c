// The C interface: picks the level once and hands on. The only file compiled for any processor.
#include "cpu_level.hpp"
#include "multiply.hpp"
#include "pool.hpp"
#include "tokens.hpp"

using namespace native;

#define EACH(DO)                      \
    DO(embed, cpmcu_embed_args)       \
    DO(norm, cpmcu_norm_args)         \
    DO(pack, cpmcu_pack_args)         \
    DO(swiglu, cpmcu_swiglu_args)     \
    DO(multiply, cpmcu_multiply_args) \
    DO(add, cpmcu_add_args)           \
    DO(rotate, cpmcu_rotate_args)     \
    DO(compress, cpmcu_compress_args) \
    DO(select, cpmcu_attend_args)     \
    DO(attend, cpmcu_attend_args)     \
    DO(merge, cpmcu_attend_args)      \
    DO(lay_out, cpmcu_lay_out_args)

#define ENTRY(name, args)                                                                                  \
    NATIVE_DECLARE(cpmcu_##name##_, args)                                                                  \
    int32_t cpmcu_##name(const args *a, int32_t ith, int32_t nth) {                                        \
        static int32_t (*const levels[])(const args *, int32_t, int32_t) = NATIVE_LEVELS(cpmcu_##name##_); \
        return levels[cpmcu_level()](a, ith, nth);                                                         \
    }

extern "C" {
int32_t cpmcu_level(void) {
    static const Level level = chosen_level("CPMCU_CPU_LEVEL");
    return level;
}
const char *cpmcu_level_name(int32_t level) { return level_name(level); }

EACH(ENTRY)

int64_t cpmcu_matrix_bytes(const cpmcu_matrix *m) { return panels_of(*m) * panel_bytes(*m); }
int64_t cpmcu_multiply_work(const cpmcu_matrix *m) { return round_up(multiply_work(*m), 64); }
int64_t cpmcu_attend_work(const native_attend_args *a) { return round_up(attend_work(&a->shape, a->block_size), 64); }
int64_t cpmcu_select_work(const native_select_args *s) { return select_run_work(&s->shape, &s->selection); }
int64_t cpmcu_partial_floats(const native_shape *s) { return s->kv_heads * MOST_SPLITS * partial_floats(s); }

void *cpmcu_pool(int32_t threads) { return Pool::make(threads); }
void cpmcu_free_pool(void *pool) { delete static_cast<Pool *>(pool); }
int64_t cpmcu_join_texts(const uint8_t *data, int64_t size, int64_t at, int64_t count, uint8_t *out) {
    for (int64_t i = 0; i < count; ++i) {
        uint64_t length;
        if (size - at < 8) return -1;
        std::memcpy(&length, data + at, 8);
        at += 8;
        if (length > uint64_t(size - at)) return -1;
        if (std::memchr(data + at, 0, length)) return -2;
        if (out) {
            std::memcpy(out, data + at, length);
            out += length;
            *out++ = 0;
        }
        at += int64_t(length);
    }
    return at;
}

int32_t cpmcu_run(void *pool, const cpmcu_record *records, int32_t count) {
    return static_cast<Pool *>(pool)->run(records, count);
}
int32_t cpmcu_share_out(void *pool, const cpmcu_record *records, int32_t count, int32_t *failed) {
    return static_cast<Pool *>(pool)->share_out(records, count, failed);
}
}
