/* Which kernel family runs. Every file of this directory is compiled on every CPU (the other
 * architecture's files are then empty) with -O3 -ffp-contract=off -fno-fast-math and, in addition,
 *
 *   avx2.c        -mavx2 -mfma
 *   avx512vnni.c  -mavx2 -mfma -mavx512f -mavx512bw -mavx512vl -mavx512vnni
 *   neon.c        -fno-schedule-insns
 *   neondot.c     -fno-schedule-insns -march=armv8.2-a+dotprod    (clang: -mcpu=generic+dotprod)
 *
 * No other file may have the instruction flags: the choice below is made by code that runs on every
 * CPU. -fno-schedule-insns keeps gcc's first scheduler from lengthening live ranges until the sums
 * no longer fit the 32 registers. */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernels.h"

static bool always(void) { return true; }

#if defined(__x86_64__)
/* __builtin_cpu_supports also asks whether the operating system saves the wide registers. */
static bool has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static bool has_avx512vnni(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
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
