/* Which kernel family runs: the best one that this CPU has, or the one that BAPQ_ISA names. Every
 * file of this directory is compiled on every CPU, the other architecture's to nothing; only the
 * families' own files may use more instructions than the oldest CPU has (CMakeLists.txt). */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#endif

#include "kernels.h"

static bool always(void) { return true; }

#if defined(__x86_64__)
/* By hand, because __builtin_cpu_supports needs a library of the compiler's, and that of zig, which
 * builds our wheels, answers no to everything. XCR0 says which registers the operating system
 * saves: bits 1 and 2 are xmm and ymm, 5 to 7 the masks and zmm. */
enum { XCR0_AVX = 0x06, XCR0_AVX512 = 0xe6 };

static bool saves(uint32_t registers) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & bit_OSXSAVE) == 0) {
        return false;
    }
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & registers) == registers;
}

static bool has_avx2(void) {
    unsigned a, b, c, d;
    const unsigned basic = bit_AVX | bit_FMA;
    return saves(XCR0_AVX) && __get_cpuid(1, &a, &b, &c, &d) && (c & basic) == basic &&
           __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2) != 0;
}

static bool has_avx512vnni(void) {
    unsigned a, b, c, d;
    const unsigned wide = bit_AVX512F | bit_AVX512BW | bit_AVX512VL;
    return has_avx2() && saves(XCR0_AVX512) && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
           (b & wide) == wide && (c & bit_AVX512VNNI) != 0;
}
#elif defined(__aarch64__)
static bool has_dotprod(void) { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#endif

/* Best first. */
static const struct {
    const bapq_kernels *kernels;
    bool (*supported)(void);
} families[] = {
#if defined(__x86_64__)
    {&bapq_kernels_avx512vnni, has_avx512vnni},
    {&bapq_kernels_avx2, has_avx2},
#elif defined(__aarch64__)
    {&bapq_kernels_neondot, has_dotprod},
    {&bapq_kernels_neon, always},
#endif
    {&bapq_kernels_scalar, always},
};

enum { FAMILY_COUNT = sizeof families / sizeof *families };

const bapq_kernels *bapq_kernels_by_name(const char *name) {
    for (int f = 0; f < FAMILY_COUNT; f++) {
        if (strcmp(families[f].kernels->name, name) == 0) {
            return families[f].supported() ? families[f].kernels : NULL;
        }
    }
    return NULL;
}

const bapq_kernels *bapq_kernels_best(void) {
    const char *name = getenv("BAPQ_ISA");
    if (name != NULL && *name != '\0') {
        return bapq_kernels_by_name(name);
    }
    int f = 0;
    while (!families[f].supported()) {
        f++;
    }
    return families[f].kernels;
}

int32_t bapq_kernels_available(const bapq_kernels **out, int32_t capacity) {
    int32_t count = 0;
    for (int f = 0; f < FAMILY_COUNT; f++) {
        if (families[f].supported()) {
            if (count < capacity) {
                out[count] = families[f].kernels;
            }
            count++;
        }
    }
    return count;
}
