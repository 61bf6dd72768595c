// Every operation for one instruction level: compiled once for each, with that level's flags and NATIVE_LEVEL.
#include "multiply.hpp"
#include "prepare.hpp"

#define JOIN(a, b) a##b
#define NAME(prefix, level) JOIN(prefix, level)

extern "C" {
int32_t NAME(bitcpm_prepare_, NATIVE_LEVEL)(const bitcpm_prepare_args *a, int32_t ith, int32_t nth) {
    return bitcpm::prepare(a, ith, nth);
}
int32_t NAME(bitcpm_multiply_, NATIVE_LEVEL)(const bitcpm_multiply_args *a, int32_t ith, int32_t nth) {
    return bitcpm::multiply(a, ith, nth);
}
}
