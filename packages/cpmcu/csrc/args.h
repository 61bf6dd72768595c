// The C interface: an operation is `int32_t name(const args *, int32_t ith, int32_t nth)`. It does share `ith` of
// `nth`, allocates nothing, keeps no state, and returns 0 or an error: 1 (unknown kind of weights or dtype), 2 (a number that is not finite).
//
// A model is a list of records (operation, arguments) over memory that is laid out before the first token.
// `cpmcu_run` goes through it on its own threads, with a barrier after each record. What changes from call to call is
// in one `cpmcu_step`, to which the arguments point.
//
// Letters: T new tokens, h hidden size, H query heads, K key-value heads, D head size, F feed-forward size.
#pragma once
#include "select_args.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int64_t tokens;     // T
    int64_t start;      // tokens in the cache before them
    const int64_t *ids; // [T]
    const float *cos, *sin;  // [T, D]: x cos + (x rolled by D / 2) sin
    int32_t every;      // the head runs for all tokens, not for the last alone
    int32_t unused;
} cpmcu_step;

// Weights [rows, cols] in panels of 16 rows, the last one filled up with zeros; panels are contiguous. Within one:
//   FLOAT32   [cols][16]
//   BFLOAT16  [cols / 2][16][2]
//   INT8      [cols / 4][16][4], bytes w + 128
//   INT4      [cols / 8][16][4], bytes with w + 8 of columns 8 i + j below, of 8 i + 4 + j above; with `shifts`, which
//             lie as scales do, a weight is w * scale + shift
// and for the integers one float16 scale for `group` columns, at most 128, of a row: scales [panel][cols / group][16].
// ROWS are somebody else's weights (bitcpm's), whose operations take activations as rows of floats.
enum { CPMCU_FLOAT32 = 0, CPMCU_BFLOAT16 = 1, CPMCU_INT8 = 2, CPMCU_INT4 = 3, CPMCU_ROWS = 4 };
typedef struct {
    const void *data;
    const uint16_t *scales, *shifts;
    int64_t rows, cols;
    int32_t kind, group;
} cpmcu_matrix;

// What a matrix is multiplied by: T rows of `cols` numbers, in blocks of 12 tokens (one token alone: a block of 1).
// Within a block of W: floats [cols][W], bfloat16 [cols / 2][W][2], int8 [cols / 4][W][4]; ROWS: floats [T][cols]. For
// integers, with the groups of the matrix, `scales` [block][cols / group][W]; `offsets` likewise: minus the matrix's zero
// point times the sum of the group, and `zeros`: minus the activations' own zero point, that of a grid from the least to
// the largest of a group. Or, where there are matrix tiles and the step has many tokens, blocks of 16 tokens in
// bfloat16, [cols / 32][16][32], whatever the kind but FLOAT32. Room for both: T up to a multiple of 48, 2 bytes a column.
typedef struct {
    void *data;
    float *scales;
    int32_t *offsets, *zeros;
    int64_t cols;
    int32_t kind, group;
} cpmcu_packed;

// x [T, h] = scale * rows of the table.
typedef struct {
    const cpmcu_step *step;
    cpmcu_matrix table;
    float *x;
    float scale;
    int32_t unused;
} cpmcu_embed_args;

// packed = scale * RMSNorm(x) * weight; of the last token alone if `last` and not step.every.
typedef struct {
    const cpmcu_step *step;
    const float *x, *weight;
    cpmcu_packed to;
    float eps, scale;
    int32_t last, unused;
} cpmcu_norm_args;

// packed = attention's output [H, T, D] in dtype, as [T, H D].
typedef struct {
    const cpmcu_step *step;
    const void *out;
    cpmcu_packed to;
    int64_t heads, dim;
    int32_t dtype, unused;
} cpmcu_pack_args;

// packed = silu(gate) * up, of [T, 2 F]; nothing, if the product with `weights` before it has done that.
typedef struct {
    const cpmcu_step *step;
    const float *gate_up;
    cpmcu_packed to;
    cpmcu_matrix weights;
} cpmcu_swiglu_args;

// out [T, rows] = alpha * packed · weightsᵀ + bias; or out += alpha * the product if `add`. With `gated.data`, and where the
// step is multiplied in tiles (tiles.hpp), not `out` but `gated` = silu(first half) * second half of the rows.
typedef struct {
    const cpmcu_step *step;
    cpmcu_matrix weights;
    cpmcu_packed from;
    float *out;
    const float *bias;
    char *work;  // cpmcu_multiply_work() for each thread
    int64_t work_stride;
    float alpha;
    int32_t add, last, unused;
    cpmcu_packed gated;
} cpmcu_multiply_args;

// x [T, width] += alpha * y.
typedef struct {
    const cpmcu_step *step;
    const float *y;
    float *x;
    int64_t width;
    float alpha;
    int32_t unused;
} cpmcu_add_args;

// Splits qkv [T, (H + 2 K) D]: normalises queries and keys if there are weights [D], rotates them, writes queries
// [T, H, D] and, from step.start on, rows of the caches [K, room, D], which are int8 (native_shape) if it says so.
typedef struct {
    const cpmcu_step *step;
    const float *qkv, *q_norm, *k_norm;
    void *q, *k, *v;
    int64_t heads, kv_heads, dim, room;
    float eps;
    int32_t dtype, int8, unused;
} cpmcu_rotate_args;

// Causal attention of q over the cache: over all keys, or over the blocks that `select` chooses where the step's first
// token sees `sparse_from` keys or more. `attend.shape.queries`, `keys`, the strides of q and out, tile and splits are made
// from the step, and so is what both share; `partial` has room for cpmcu_partial_floats().
typedef struct {
    const cpmcu_step *step;
    native_attend_args attend;
    native_select_args select;  // its blocks: room for one token
    int64_t sparse_from;        // INT64_MAX: never
} cpmcu_attend_args;

// Compressed keys of the kernels that the step completes.
typedef struct {
    const cpmcu_step *step;
    native_compress_args compress;
} cpmcu_compress_args;

// Where weights come from: numbers, int8 codes around 0, codes of 4 bits plus 8 with column 2 j in the low and 2 j + 1 in
// the high half of byte j, or blocks of GGUF's Q4_0, Q8_0, Q4_1 and Q4_K (csrc/lay_out.hpp).
enum {
    CPMCU_OF_FLOAT32 = 0, CPMCU_OF_BFLOAT16 = 1, CPMCU_OF_INT8 = 2, CPMCU_OF_FLOAT16 = 3, CPMCU_OF_NIBBLES = 4,
    CPMCU_OF_Q4_0 = 5, CPMCU_OF_Q8_0 = 6, CPMCU_OF_Q4_1 = 7, CPMCU_OF_Q4_K = 8
};

// Lays out `rows` rows in one of the layouts above, from row `first` of the matrix on; a call that reaches the matrix's end
// fills up the last panel. Codes that are `kept` keep their scales, and nothing is rounded (but what scales and shifts are
// products of, to float16): they are of as many bits and in groups as large as the matrix's, which has shifts if they do. Other codes become numbers first. Integers are made of numbers by the largest
// magnitude of a group, each value to the nearest step. A scale that is not finite is error 2.
typedef struct {
    const void *from;
    int64_t row;  // bytes from one row to the next
    cpmcu_matrix to;
    const uint16_t *scales;  // of int8 codes and nibbles, float16 [rows, cols / group]
    int32_t source, group;   // CPMCU_OF_...; columns to a scale
    int64_t first, rows;
    int64_t heads;           // not 0: rows of so many heads, neighbouring pairs to be put in a head's two halves
    int32_t through, kept;   // numbers are rounded to bfloat16 first; codes stay as they are
} cpmcu_lay_out_args;

int32_t cpmcu_embed(const cpmcu_embed_args *, int32_t ith, int32_t nth);
int32_t cpmcu_norm(const cpmcu_norm_args *, int32_t ith, int32_t nth);
int32_t cpmcu_pack(const cpmcu_pack_args *, int32_t ith, int32_t nth);
int32_t cpmcu_swiglu(const cpmcu_swiglu_args *, int32_t ith, int32_t nth);
int32_t cpmcu_multiply(const cpmcu_multiply_args *, int32_t ith, int32_t nth);
int32_t cpmcu_add(const cpmcu_add_args *, int32_t ith, int32_t nth);
int32_t cpmcu_rotate(const cpmcu_rotate_args *, int32_t ith, int32_t nth);
int32_t cpmcu_compress(const cpmcu_compress_args *, int32_t ith, int32_t nth);
int32_t cpmcu_select(const cpmcu_attend_args *, int32_t ith, int32_t nth);
int32_t cpmcu_attend(const cpmcu_attend_args *, int32_t ith, int32_t nth);
int32_t cpmcu_merge(const cpmcu_attend_args *, int32_t ith, int32_t nth);
int32_t cpmcu_lay_out(const cpmcu_lay_out_args *, int32_t ith, int32_t nth);

int64_t cpmcu_matrix_bytes(const cpmcu_matrix *);  // of its data
int64_t cpmcu_multiply_work(const cpmcu_matrix *); // bytes a thread
int64_t cpmcu_attend_work(const native_attend_args *);  // bytes a thread
int64_t cpmcu_select_work(const native_select_args *);  // bytes a thread
int64_t cpmcu_partial_floats(const native_shape *);
// Where `count` texts of a GGUF file end, each a length in 8 bytes and its bytes, from `at` on in data [size]; -1: beyond the
// data, -2: one has a zero byte. With `out` they are written there one after the other, a zero after each.
int64_t cpmcu_join_texts(const uint8_t *data, int64_t size, int64_t at, int64_t count, uint8_t *out);
int32_t cpmcu_level(void);
const char *cpmcu_level_name(int32_t);

typedef struct {
    int32_t (*operation)(const void *, int32_t, int32_t);
    const void *args;
} cpmcu_record;

// `threads` threads, the caller's one of them: the others sleep between calls of `cpmcu_run`. Null if there are none to
// be had. One call at a time.
void *cpmcu_pool(int32_t threads);
void cpmcu_free_pool(void *pool);
int32_t cpmcu_run(void *pool, const cpmcu_record *records, int32_t count);  // 0, or the first error
// Records that do not depend on each other, each whole on one thread, with no barriers between them. 0, or an error of
// the record whose index is then in `failed`.
int32_t cpmcu_share_out(void *pool, const cpmcu_record *records, int32_t count, int32_t *failed);

#ifdef __cplusplus
}
#endif
