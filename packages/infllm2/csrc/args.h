// The C interface: every operation is `int32_t name(const args *, int32_t ith, int32_t nth)`. It does share
// `ith` of `nth`, allocates nothing, keeps no state, and returns 0, 1 (unknown dtype) or 2 (tile too large). The caller
// owns the threads.
//
// Letters, strides and dtypes: see attend_args.h.
#pragma once
#include "attend_args.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef native_tensor infllm2_tensor;
typedef native_shape infllm2_shape;
typedef native_attend_args infllm2_attend_args;  // its partial: infllm2_partial_floats for each unit and split

typedef struct {
    int32_t kernel_size, kernel_stride, coarse_factor, block_size;
    int32_t init_blocks, window_blocks, budget, exact;
    float scale;  // on the logits of selection
    int32_t unused;
} infllm2_selection;

// blocks int32 [B, K, T, budget]: ascending, then -1. fine and coarse: all complete compressed keys [B, K, *, D].
typedef struct {
    infllm2_shape shape;
    infllm2_selection selection;
    infllm2_tensor q, fine, coarse;
    int32_t *blocks;
    char *work;  // nth * infllm2_select_work() bytes
    int64_t work_stride;
} infllm2_select_args;

int32_t infllm2_select(const infllm2_select_args *, int32_t ith, int32_t nth);
int32_t infllm2_attend(const infllm2_attend_args *, int32_t ith, int32_t nth);
int32_t infllm2_merge(const infllm2_attend_args *, int32_t ith, int32_t nth);
// Both steps for each query in turn; the selection's blocks may be null, its q and shape are the attention's.
typedef struct {
    infllm2_select_args select;
    infllm2_attend_args attend;
} infllm2_run_args;
int32_t infllm2_run(const infllm2_run_args *, int32_t ith, int32_t nth);

// Gradients of infllm2_attend over its blocks (null: all keys). attend: shape, q, k, v, blocks, width, work, tile,
// block_size, scale; the rest is not read. grad: dO. lse as attend gave it; delta = rowsum(dO * O) - dlse, float32
// [B, H, T]. grad_q [B, H, T, D] is written here, grad_k and grad_v [B, K, S, D] by infllm2_gather from `gradients`:
// infllm2_gradient_floats for each batch row, key-value head and slot. slots: 1, or the number of threads.
typedef struct {
    infllm2_attend_args attend;
    infllm2_tensor grad;
    const float *lse, *delta;
    void *grad_q, *grad_k, *grad_v;
    float *gradients;
    int64_t slots;
} infllm2_backward_args;
int32_t infllm2_backward(const infllm2_backward_args *, int32_t ith, int32_t nth);
int32_t infllm2_gather(const infllm2_backward_args *, int32_t ith, int32_t nth);

// Writes fine kernels [fine_begin, fine_end) and coarse ones [coarse_begin, coarse_end) of the keys [B, K, S, D] into
// `fine` and `coarse`, which hold all of them.
typedef struct {
    infllm2_tensor keys, fine, coarse;
    int64_t batch, kv_heads, dim;
    int64_t fine_begin, fine_end, coarse_begin, coarse_end;
    int32_t kernel_size, kernel_stride, coarse_factor, dtype;
} infllm2_compress_args;
int32_t infllm2_compress(const infllm2_compress_args *, int32_t ith, int32_t nth);

// Writes `rows` new keys and values from row `at` on into the buffers k and v.
typedef struct {
    infllm2_tensor new_k, new_v, k, v;
    int64_t batch, heads, rows, dim, at;
    int32_t dtype, unused;
} infllm2_append_args;
int32_t infllm2_append(const infllm2_append_args *, int32_t ith, int32_t nth);

int64_t infllm2_backward_work(const infllm2_shape *, int64_t block_size);       // bytes a thread
int64_t infllm2_gradient_floats(const infllm2_shape *);
int64_t infllm2_select_work(const infllm2_shape *, const infllm2_selection *);  // bytes a thread
int64_t infllm2_attend_work(const infllm2_shape *, int64_t block_size);         // bytes a thread
int64_t infllm2_partial_floats(const infllm2_shape *);                           // for each query head group and split
int32_t infllm2_level(void);
const char *infllm2_level_name(int32_t);

#ifdef __cplusplus
}
#endif
