// The C interface: every operation is `int32_t name(const args *, int32_t ith, int32_t nth)`. It does share
// `ith` of `nth`, allocates nothing, keeps no state, and returns 0, 1 (unknown dtype) or 2 (tile too large). The caller
// owns the threads.
//
// Letters, strides and dtypes: see attend_args.h and select_args.h.
#pragma once
#include "select_args.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef native_tensor infllm2_tensor;
typedef native_shape infllm2_shape;
typedef native_selection infllm2_selection;
typedef native_select_args infllm2_select_args;
typedef native_run_args infllm2_run_args;
typedef native_compress_args infllm2_compress_args;
typedef native_attend_args infllm2_attend_args;  // its partial: infllm2_partial_floats for each unit and split

int32_t infllm2_select(const infllm2_select_args *, int32_t ith, int32_t nth);
int32_t infllm2_attend(const infllm2_attend_args *, int32_t ith, int32_t nth);
int32_t infllm2_merge(const infllm2_attend_args *, int32_t ith, int32_t nth);
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
