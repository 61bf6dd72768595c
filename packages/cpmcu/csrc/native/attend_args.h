// Copied from common/native/attend_args.h by common/sync.py: change it there.
// Attention as C sees it: tensors with strides, and the arguments of one call.
//
// Letters: B batch, H query heads, K key-value heads, G = H / K, T queries, S keys, D head size. Queries are the
// last T of S positions. Strides are in elements; the last axis is always contiguous. dtype: 0 float32, 1 bfloat16.
// Keys and values have the dtype, or, with `int8`, rows of D int8 codes and the float32 they are multiplied by.
#pragma once
#include <stdint.h>

typedef struct {
    const void *data;
    int64_t batch, head, row;  // strides
} native_tensor;

typedef struct {
    int64_t batch, kv_heads, group, queries, keys, dim;
    int32_t dtype, int8;
} native_shape;

// out [B, H, T, D] in dtype, lse float32 [B, H, T] or null. Blocks int32 [B, K, T, width], ascending, then -1; a null
// pointer means all keys (dense attention). `tile` tokens are a unit of work: at most 128, tile * G at most 512
// unless tile is 1.
// With a `window` that is not 0 a token sees the last so many keys, its own among them; only without blocks.
// With splits > 1 each unit is cut in as many; listed blocks then need tile = 1, `partial` must hold
// partial_floats() for each unit and split, and a second pass merges them.
typedef struct {
    native_shape shape;
    native_tensor q, k, v;
    const int32_t *blocks;
    int64_t width;
    void *out;
    float *lse;
    char *work;  // nth * attend_work() bytes
    int64_t work_stride;
    float *partial;
    int64_t splits;
    int64_t tile;
    int32_t block_size;
    float scale;
    int64_t window;
} native_attend_args;
