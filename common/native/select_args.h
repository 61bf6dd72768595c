// Selection of blocks as C sees it (arXiv 2509.24663, section 3): compressed keys, and the arguments of one choice.
//
// Letters, strides and dtypes: see attend_args.h.
#pragma once
#include "attend_args.h"

typedef struct {
    int32_t kernel_size, kernel_stride, coarse_factor, block_size;
    int32_t init_blocks, window_blocks, budget, exact;
    float scale;  // on the logits of selection
    int32_t unused;
} native_selection;

// blocks int32 [B, K, T, budget]: ascending, then -1. fine and coarse: all complete compressed keys [B, K, *, D].
typedef struct {
    native_shape shape;
    native_selection selection;
    native_tensor q, fine, coarse;
    int32_t *blocks;
    char *work;  // nth * select_run_work() bytes
    int64_t work_stride;
} native_select_args;

// Selection and attention for each query in turn; the selection's blocks may be null, its q and shape are the
// attention's.
typedef struct {
    native_select_args select;
    native_attend_args attend;
} native_run_args;

// Kernels [fine_begin, fine_end) and coarse ones [coarse_begin, coarse_end) of the keys [B, K, S, D] are written to `fine`
// and `coarse`, which hold all of them.
typedef struct {
    native_tensor keys, fine, coarse;
    int64_t batch, kv_heads, dim;
    int64_t fine_begin, fine_end, coarse_begin, coarse_end;
    int32_t kernel_size, kernel_stride, coarse_factor, dtype, int8, unused;  // int8: the keys are, as in native_shape
} native_compress_args;
