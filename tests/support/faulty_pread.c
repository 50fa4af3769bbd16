/* Preloaded into a process, it answers the reads of plane files as a struct in the file that
 * BAPQ_FAULTS names says. Counts below 0 mean no end. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct faults {
    int32_t reads;        /* of plane files so far */
    int32_t pass;         /* good reads before those that fail */
    int32_t fail;         /* reads that fail then */
    int32_t error;        /* how: errno; 0: end of file */
    int32_t interrupts;   /* EINTR this many times before every read */
    int32_t largest;      /* most bytes of one read, cut at random; 0: no limit */
    int32_t microseconds; /* of delay */
};

static volatile struct faults *faults;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static ssize_t (*real_pread)(int, void *, size_t, off_t);

static void prepare(void) {
    real_pread = (ssize_t(*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread");
    const char *path = getenv("BAPQ_FAULTS");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *map = mmap(NULL, sizeof *faults, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (map != MAP_FAILED) faults = map;
}

static int is_plane(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    path[n > 0 ? n : 0] = 0;
    return strstr(path, "/planes/") != NULL;
}

ssize_t pread(int fd, void *target, size_t bytes, off_t offset) {
    static _Thread_local int interrupted;
    static unsigned seed = 1;
    pthread_once(&once, prepare);
    if (faults == NULL || !is_plane(fd)) return real_pread(fd, target, bytes, offset);
    if (interrupted < faults->interrupts) {
        interrupted++;
        errno = EINTR;
        return -1;
    }
    interrupted = 0;
    if (faults->microseconds) usleep((useconds_t)faults->microseconds);
    int failing = 0;
    /* Each once: the test may change them meanwhile. */
    int32_t largest = faults->largest, error = faults->error;
    pthread_mutex_lock(&lock);
    faults->reads++;
    if (faults->pass != 0) {
        if (faults->pass > 0) faults->pass--;
    } else if (faults->fail != 0) {
        if (faults->fail > 0) faults->fail--;
        failing = 1;
    }
    if (largest > 0 && bytes > 1) {
        size_t most = 1 + (size_t)rand_r(&seed) % (size_t)largest;
        if (bytes > most) bytes = most;
    }
    pthread_mutex_unlock(&lock);
    if (failing && error == 0) return 0;
    if (failing) {
        errno = error;
        return -1;
    }
    return real_pread(fd, target, bytes, offset);
}

ssize_t pread64(int fd, void *target, size_t bytes, off_t offset) {
    return pread(fd, target, bytes, offset);
}
