// Copied from common/native/cpu_level.hpp by common/sync.py: change it there.
// Which instructions this processor and its operating system offer: asked once, from CPUID and XCR0.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace native {

// A translation unit is compiled for each level that a tool has. Each of the first three includes the ones before it. The
// last two both include AVX512 and int8's dot products (VNNI): with those of bfloat16, or with byte permutations.
enum Level : int32_t { SCALAR = 0, AVX2 = 1, AVX512 = 2, AVX512_BF16 = 3, AVX512_VNNI = 4 };

inline const char *level_name(int32_t level) {
    static const char *const names[] = {"scalar", "avx2", "avx512", "avx512_bf16", "avx512_vnni"};
    return level >= SCALAR && level <= AVX512_VNNI ? names[level] : "unknown";
}

// `top`: the tool's highest level.
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
    if (top == AVX512_VNNI) return (c & vbmi_vnni) == vbmi_vnni ? AVX512_VNNI : AVX512;
    if (max_subleaf < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return AVX512;
    return vnni && (a & (1u << 5)) ? AVX512_BF16 : AVX512;
#else
    return SCALAR;
#endif
}

// The level to run, read from the environment variable `variable` if it names a lower one.
inline Level chosen_level(const char *variable, Level top) {
    const Level best = detect_level(top);
    const char *wanted = std::getenv(variable);
    for (int32_t level = SCALAR; wanted && level < best && level <= AVX512; ++level)
        if (!std::strcmp(wanted, level_name(level))) return static_cast<Level>(level);
    return best;
}

}  // namespace native
