// Copied from common/native/amx.hpp by common/sync.py: change it there.
// AMX: eight tiles of up to 16 rows of 64 bytes, and their products.
//
// C[16 rows][16 lanes] += A[16 rows][16 units] · B[16 units][16 lanes], where a unit is 32 bits: two bfloat16 or four int8
// neighbours along the sum. A's rows lie in memory as they are; B's rows hold one unit of each lane.
//
// Written as assembly because some compilers' intrinsics do not say that a tile load reads memory, and may move a store past it.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__AMX_TILE__)
namespace native {
inline namespace NATIVE_LEVEL {

// Tiles are configured while one of these lives: one for each share of an operation. Nothing is left behind, so that
// other libraries find tiles as they expect them, and threads that only wait have no tiles to be saved.
// `rows` of each tile: fewer rows of A and C take less time.
struct Tiles {
    Tiles() : Tiles({16, 16, 16, 16, 16, 16, 16, 16}) {}
    explicit Tiles(const uint8_t (&rows)[8]) {
        alignas(64) uint8_t config[64] = {1};
        for (int i = 0; i < 8; ++i) config[16 + 2 * i] = 64, config[48 + i] = rows[i];
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles &) = delete;
    Tiles &operator=(const Tiles &) = delete;
};

// Rows `stride` bytes apart.
template <int TILE> inline void tile_load(const void *from, ptrdiff_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE> inline void tile_store(void *to, ptrdiff_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE> inline void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(TILE)); }
// C += A · B: in float32, each unit's two products and the sum rounded in turn, denormals as zeros.
template <int C, int A, int B> inline void tile_dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// C += A · B: exactly, in int32, with both signed, or one of them unsigned.
template <int C, int A, int B> inline void tile_dot_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B> inline void tile_dot_uint8_int8() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B> inline void tile_dot_int8_uint8() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace NATIVE_LEVEL
}  // namespace native
#endif
