// Which instructions this processor and its operating system offer: asked once, from CPUID, XCR0 and, for tiles, the
// system itself.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Native.cmake says which levels it compiles. NATIVE_LEVELS(f_): f_scalar, f_avx2 and so on by level, null where there is none.
#if defined(NATIVE_HAS_avx2)
#define NATIVE_AVX2(f) f##avx2
#else
#define NATIVE_AVX2(f) 0
#endif
#if defined(NATIVE_HAS_avx512)
#define NATIVE_AVX512(f) f##avx512
#else
#define NATIVE_AVX512(f) 0
#endif
#if defined(NATIVE_HAS_avx512_bf16)
#define NATIVE_AVX512_BF16(f) f##avx512_bf16
#else
#define NATIVE_AVX512_BF16(f) 0
#endif
#if defined(NATIVE_HAS_avx512_vnni)
#define NATIVE_AVX512_VNNI(f) f##avx512_vnni
#else
#define NATIVE_AVX512_VNNI(f) 0
#endif
#if defined(NATIVE_HAS_amx)
#define NATIVE_AMX(f) f##amx
#else
#define NATIVE_AMX(f) 0
#endif
#define NATIVE_LEVELS(f) \
    {f##scalar, NATIVE_AVX2(f), NATIVE_AVX512(f), NATIVE_AVX512_BF16(f), NATIVE_AVX512_VNNI(f), NATIVE_AMX(f)}
// Declares operation f_scalar and so on.
#define NATIVE_DECLARE(f, args)                                   \
    int32_t f##scalar(const args *, int32_t, int32_t);                 \
    int32_t f##avx2(const args *, int32_t, int32_t);        \
    int32_t f##avx512(const args *, int32_t, int32_t);      \
    int32_t f##avx512_bf16(const args *, int32_t, int32_t); \
    int32_t f##avx512_vnni(const args *, int32_t, int32_t); \
    int32_t f##amx(const args *, int32_t, int32_t);

namespace native {

// A translation unit is compiled for each level that a tool has. Each of the first three includes the ones before it.
// Then come, both beyond AVX512, dot products of int8 (VNNI) and bfloat16, and VNNI with byte permutations (VBMI); and all
// of these with tiles of both.
enum Level : int32_t { SCALAR, AVX2, AVX512, AVX512_BF16, AVX512_VNNI, AMX };
constexpr int32_t LEVELS = AMX + 1;

namespace built {
constexpr bool scalar = true, avx2 = true, avx512 = true, avx512_bf16 = true, avx512_vnni = true, amx = true;
constexpr bool BY_LEVEL[LEVELS] = NATIVE_LEVELS();
}  // namespace built
constexpr auto &BUILT = built::BY_LEVEL;

inline const char *level_name(int32_t level) {
    static const char *const names[LEVELS] = {"scalar", "avx2", "avx512", "avx512_bf16", "avx512_vnni", "amx"};
    return level >= 0 && level < LEVELS ? names[level] : "unknown";
}

// Tiles are 8 KB of state for each thread, which Linux sets aside once a process has asked for it (5.16 and later).
inline bool tiles_permitted() {
#if defined(__linux__) && defined(__x86_64__) && defined(SYS_arch_prctl)
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
#else
    return false;
#endif
}

inline bool has_level(Level level) {
    if (level == SCALAR) return true;
#if defined(__x86_64__)
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
    const bool fma = c & (1u << 12), osxsave = c & (1u << 27), avx = c & (1u << 28), f16c = c & (1u << 29);
    if (!(fma && osxsave && avx && f16c)) return false;
    uint32_t saved, unused;  // does the system save the wide registers?
    __asm__("xgetbv" : "=a"(saved), "=d"(unused) : "c"(0));
    if ((saved & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool avx2 = b & (1u << 5);
    if (level == AVX2) return avx2;
    const uint32_t f_dq_bw_vl = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);
    const bool avx512 = avx2 && (saved & 0xe6) == 0xe6 && (b & f_dq_bw_vl) == f_dq_bw_vl;
    if (level == AVX512) return avx512;
    const bool vnni = avx512 && c & (1u << 11), vbmi = c & (1u << 1);
    if (level == AVX512_VNNI) return vnni && vbmi;
    const uint32_t bf16_tile_int8 = (1u << 22) | (1u << 24) | (1u << 25);
    const bool tiles = (d & bf16_tile_int8) == bf16_tile_int8 && (saved & 0x60000) == 0x60000;
    const bool bf16 = a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & (1u << 5);
    if (level == AVX512_BF16) return vnni && bf16;
    return vnni && vbmi && bf16 && tiles && tiles_permitted();
#else
    return false;
#endif
}

// The last level that the library was built for and this machine has, or the one before it that the environment variable
// `variable` names.
inline Level chosen_level(const char *variable) {
    const char *wanted = std::getenv(variable);
    Level best = SCALAR;
    for (int32_t i = 0; i < LEVELS; ++i) {
        const Level level = static_cast<Level>(i);
        if (!BUILT[i] || !has_level(level)) continue;
        best = level;
        if (wanted && !std::strcmp(wanted, level_name(level))) break;
    }
    return best;
}

}  // namespace native
