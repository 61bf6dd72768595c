// Copied from common/native/cpu_level.hpp by common/sync.py: change it there.
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

namespace native {

// A translation unit is compiled for each level that a tool has. Each of the first five includes the ones before it:
// AVX512_BF16 adds int8's dot products (VNNI) and those of bfloat16, AMX tiles of both and byte permutations (VBMI).
// AVX512_VNNI, which is not in that line, is AVX512 with VNNI and byte permutations.
enum Level : int32_t { SCALAR = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3, AMX = 4, AVX512_VNNI = 5 };

inline const char *level_name(int32_t level) {
    static const char *const names[] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx", "avx512_vnni"};
    return level >= SCALAR && level <= AVX512_VNNI ? names[level] : "unknown";
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

// `top`: the tool's highest level, AVX512_BF16, AMX or AVX512_VNNI.
inline Level detect_level(Level top) {
#if defined(__x86_64__)
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return SCALAR;
    const bool fma = c & (1u << 12), osxsave = c & (1u << 27), avx = c & (1u << 28), f16c = c & (1u << 29);
    if (!(fma && osxsave && avx && f16c)) return SCALAR;
    uint32_t low, high;  // does the system save the wide registers?
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return SCALAR;
    const uint32_t max_subleaf = a;
    if (!(b & (1u << 5))) return SCALAR;  // AVX2
    const uint32_t f_dq_bw_vl = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);
    if ((low & 0xe6) != 0xe6 || (b & f_dq_bw_vl) != f_dq_bw_vl) return AVX2;
    const uint32_t vbmi_vnni = (1u << 1) | (1u << 11), vnni = c & (1u << 11);
    const uint32_t bf16_tile_int8 = (1u << 22) | (1u << 24) | (1u << 25), saved = 0x60000;
    const bool tiles = (c & vbmi_vnni) == vbmi_vnni && (d & bf16_tile_int8) == bf16_tile_int8 && (low & saved) == saved;
    if (top == AVX512_VNNI) return (c & vbmi_vnni) == vbmi_vnni ? AVX512_VNNI : AVX512;
    if (max_subleaf < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return AVX512;
    if (!(vnni && (a & (1u << 5)))) return AVX512;
    return top == AMX && tiles && tiles_permitted() ? AMX : AVX512_BF16;
#else
    return SCALAR;
#endif
}

// The level to run, read from the environment variable `variable` if it names a lower one.
inline Level chosen_level(const char *variable, Level top) {
    const char *wanted = std::getenv(variable);
    if (wanted && top == AMX && !std::strcmp(wanted, level_name(AVX512_BF16))) top = AVX512_BF16;
    const Level best = detect_level(top);
    for (int32_t level = SCALAR; wanted && level < best && level <= AVX512; ++level)
        if (!std::strcmp(wanted, level_name(level))) return static_cast<Level>(level);
    return best;
}

}  // namespace native
