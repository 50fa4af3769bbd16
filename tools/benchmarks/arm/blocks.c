/* A plugin for QEMU's user mode: counts the instructions that a program executes, block by block of
 * its code, and writes them to a file whenever the program calls getppid.
 *
 *     qemu-aarch64 -plugin blocks.so,out=FILE program
 *
 * FILE gets one line for each block that ran since the mark before, and one for each mark:
 *
 *     block INSTRUCTIONS OFFSET PATH      offset in the file that the code was loaded from
 *     mark
 *
 * What runs inside of the C library and its like counts for the code that called it. So does a stub
 * through which the linker binds a call: it ends with `br x17`, which compilers leave to it.
 *
 * Addresses of the program are those of this process, as long as QEMU's guest base is 0. The part
 * of QEMU's plugin interface, version 1, that is used is declared here: Debian has no header for
 * it. */
#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t plugin_id;
typedef struct qemu_plugin_tb translation;
typedef struct qemu_plugin_insn instruction;

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id,
                                           void (*translated)(plugin_id, translation *));
void qemu_plugin_register_vcpu_tb_exec_cb(translation *code, void (*executed)(unsigned, void *),
                                          int registers, void *data);
size_t qemu_plugin_tb_n_insns(const translation *code);
uint64_t qemu_plugin_tb_vaddr(const translation *code);
instruction *qemu_plugin_tb_get_insn(const translation *code, size_t index);
const void *qemu_plugin_insn_data(const instruction *instruction);
void qemu_plugin_register_vcpu_syscall_cb(plugin_id id,
                                          void (*called)(plugin_id, unsigned, int64_t, uint64_t,
                                                         uint64_t, uint64_t, uint64_t, uint64_t,
                                                         uint64_t, uint64_t, uint64_t));

enum { NO_REGISTERS = 0, GETPPID = 173, BUCKETS = 1 << 16, THREADS = 64 };
static const uint32_t BR_X17 = 0xd61f0220;
static const char LIBRARIES[] = "/aarch64-linux-gnu/"; /* where Debian has the C library */

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

/* Code that is counted by itself. */
typedef struct place {
    struct place *next;
    uint64_t address, executed, told;
    const char *path;
    uint64_t offset; /* in the file */
} place;

/* A block as QEMU translated it; there may be several of one place. */
typedef struct {
    place *at;
    uint64_t instructions;
    int counts_for_caller;
} block;

typedef struct {
    uint64_t start, end, offset;
    char *path;
} region;

static place *places[BUCKETS];
static place *owner[THREADS]; /* what the thread ran last that counts by itself */
static region *regions;
static size_t region_count;
static FILE *out;

/* What is mapped now is added to what was known; files do not take each other's place. */
static void read_regions(void) {
    char line[4096 + 256], path[4096];
    FILE *maps = fopen("/proc/self/maps", "r");
    if (!maps) return;
    while (fgets(line, sizeof line, maps)) {
        region r;
        path[0] = '\0';
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " %*s %" SCNx64 " %*s %*s %4095[^\n]", &r.start,
                   &r.end, &r.offset, path) < 3)
            continue;
        if (path[0] != '/') strcpy(path, "-"); /* no file */
        r.path = strdup(path);
        regions = realloc(regions, (region_count + 1) * sizeof *regions);
        if (!regions || !r.path) abort();
        regions[region_count++] = r;
    }
    fclose(maps);
}

static const region *find_region(uint64_t address) {
    for (size_t i = region_count; i-- > 0;) /* the newest first */
        if (regions[i].start <= address && address < regions[i].end) return &regions[i];
    return NULL;
}

static place *find_place(uint64_t address) {
    place **bucket = &places[(address >> 2) % BUCKETS];
    for (place *p = *bucket; p; p = p->next)
        if (p->address == address) return p;
    const region *r = find_region(address);
    if (!r) {
        read_regions();
        r = find_region(address);
    }
    place *p = calloc(1, sizeof *p);
    if (!p) abort();
    *p = (place){.next = *bucket,
                 .address = address,
                 .path = r ? r->path : "-",
                 .offset = r ? address - r->start + r->offset : address};
    return *bucket = p;
}

/* One thread at a time does work that is measured, so nothing here is atomic. */
static void executed(unsigned thread, void *data) {
    const block *b = data;
    place **own = &owner[thread % THREADS];
    if (!b->counts_for_caller || !*own) *own = b->at;
    (*own)->executed += b->instructions;
}

static void translated(plugin_id id, translation *code) {
    (void)id;
    block *b = malloc(sizeof *b); /* for good: QEMU may keep the code as long */
    if (!b) abort();
    b->at = find_place(qemu_plugin_tb_vaddr(code));
    b->instructions = qemu_plugin_tb_n_insns(code);
    uint32_t last;
    instruction *end = qemu_plugin_tb_get_insn(code, b->instructions - 1);
    memcpy(&last, qemu_plugin_insn_data(end), sizeof last);
    b->counts_for_caller = last == BR_X17 || strstr(b->at->path, LIBRARIES) != NULL;
    qemu_plugin_register_vcpu_tb_exec_cb(code, executed, NO_REGISTERS, b);
}

static void called(plugin_id id, unsigned thread, int64_t number, uint64_t a, uint64_t b,
                   uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g, uint64_t h) {
    (void)id, (void)thread, (void)a, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
    if (number != GETPPID) return;
    for (size_t i = 0; i < BUCKETS; i++)
        for (place *p = places[i]; p; p = p->next)
            if (p->executed != p->told) {
                fprintf(out, "block %" PRIu64 " %" PRIx64 " %s\n", p->executed - p->told, p->offset,
                        p->path);
                p->told = p->executed;
            }
    fprintf(out, "mark\n");
    fflush(out);
}

__attribute__((visibility("default"))) int qemu_plugin_install(plugin_id id, const void *info,
                                                               int count, char **arguments) {
    (void)info;
    if (count != 1 || strncmp(arguments[0], "out=", 4) != 0 ||
        !(out = fopen(arguments[0] + 4, "w"))) {
        fprintf(stderr, "blocks.so: give it a file to write, as -plugin blocks.so,out=FILE\n");
        return -1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, called);
    return 0;
}
