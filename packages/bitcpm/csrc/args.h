// The C interface: every operation is `int32_t name(const args *, int32_t ith, int32_t nth)`. It does share
// `ith` of `nth`, allocates nothing, keeps no state, and returns 0, or 1 (a field is out of range) or 2 (memory is not
// aligned to 64 bytes). The caller owns the threads. One product is bitcpm_prepare (activations), a barrier, then
// bitcpm_multiply; several products of the same activations, codec and group size share one bitcpm_prepare.
//
// Letters: O output rows, I input columns, T tokens. A row's columns fall into groups of `group` (the last may be
// shorter), each with one scale, and a group into spans of at most 240 columns.
//
// Kernel layout of a weight matrix. All parts are multiples of 64 bytes. Rows go in blocks of 64 (missing rows: codes 0,
// scales 0), blocks in strips, strips in panels; the last of each may have fewer.
//   2bit   A strip and a panel are one block.
//   1.6bit A strip has 4 blocks (2 where the matrix has 4 to 7, 1 where it has fewer), a panel 16.
// A panel is, for each span, for each strip: the codes, and after the last span of a group 64 scales for each block.
//   2bit   For each 16 columns four vectors of 64 bytes, each for 16 rows. Byte 4r + j has, for row 16v + r, columns j,
//          4 + j, 8 + j, 12 + j of the 16 as digits c + 1, the first in the low bits.
//   1.6bit For each 5 columns a vector of 64 bytes for each block. With v = c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4 a byte is |v|,
//          plus 128 if v < 0. Byte 16l + 4m + i is row 16m + 4l + i.
// Columns beyond a group's end have code 0. Bits a weight at g = 128 with 16-bit scales: 2.125 and 1.75.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { BITCPM_2BIT = 0, BITCPM_1_6BIT = 1 };                             // codec
enum { BITCPM_FLOAT32 = 0, BITCPM_BFLOAT16 = 1, BITCPM_FLOAT16 = 2 };    // dtype
enum { BITCPM_INT8_TOKEN = 0, BITCPM_INT8_GROUP = 1, BITCPM_EXACT = 2 };  // mode

typedef struct {
    int64_t rows, columns;  // O, I >= 1
    int64_t group;          // >= 1; at least `columns`: one scale for a row
    int32_t codec, scale_dtype;
} bitcpm_shape;

// Activations [T, I] to what the kernels read. Mode 0 rounds each token to int8 by its largest |x|, mode 1 each group of
// a token, mode 2 keeps float32. NaN or infinity in what shares a scale makes every result of it NaN.
typedef struct {
    bitcpm_shape shape;
    const void *x;
    int64_t tokens, x_stride;  // T >= 0; elements from token to token
    int32_t x_dtype, mode;
    char *prepared;  // bitcpm_prepared_bytes, aligned to 64
} bitcpm_prepare_args;
int32_t bitcpm_prepare(const bitcpm_prepare_args *, int32_t ith, int32_t nth);

// out[t][o] = sum over i of w[o][i] x[t][i], + bias[o]. In modes 0 and 1 a group's sum is an exact int32 for any input
// (int16 holds sums of at most 240 products, which fit); groups are added in float32, in order. In mode 2 a span is
// added up column by column in float32, then a group span by span. Results do not depend on the level, on T or on nth, bit for bit.
typedef struct {
    bitcpm_shape shape;
    const char *weights;   // kernel layout, aligned to 64
    const char *prepared;  // by bitcpm_prepare, with the same codec, columns, group and mode
    int64_t tokens, out_stride;
    int32_t out_dtype, mode;
    void *out;
    const float *bias;  // [O], or null
    char *work;         // nth * bitcpm_work_bytes, aligned to 64
    int64_t work_stride;
} bitcpm_multiply_args;
int32_t bitcpm_multiply(const bitcpm_multiply_args *, int32_t ith, int32_t nth);

// Codes int8 [O, I] in {-1, 0, 1} and scales [O, groups] of the shape's dtype to the kernel layout, and back.
typedef struct {
    bitcpm_shape shape;
    int8_t *codes;
    char *scales;
    char *weights;  // bitcpm_weight_bytes, aligned to 64
} bitcpm_layout_args;
int32_t bitcpm_lay_out(const bitcpm_layout_args *, int32_t ith, int32_t nth);
int32_t bitcpm_take_out(const bitcpm_layout_args *, int32_t ith, int32_t nth);

int64_t bitcpm_weight_bytes(const bitcpm_shape *);
int64_t bitcpm_prepared_bytes(const bitcpm_shape *, int64_t tokens, int32_t mode);
int64_t bitcpm_work_bytes(const bitcpm_shape *, int64_t tokens);  // a thread
int32_t bitcpm_level(void);
const char *bitcpm_level_name(int32_t);

#ifdef __cplusplus
}
#endif
