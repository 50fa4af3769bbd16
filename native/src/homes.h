/* Homes: the planes of a bank in this process's memory, one set for all stores that are open on the
 * same files.
 *
 * Each plane has a reserved address range as long as its file. A chunk that is at home stands at
 * its file offset in that range, read and checked; one that is not costs address space only. Stores
 * claim chunks (store_internal.h); the pages of a chunk whose last claim goes, go back to the
 * system. What one store brought home, the others need not read.
 *
 * Files are the same when device, inode and all extents are, checksums included: a bank that was
 * replaced by another one has homes of its own.
 *
 * One lock guards the homes and all that their stores hold. It is never held while reading. */
#ifndef BAPQ_HOMES_H
#define BAPQ_HOMES_H

#include <pthread.h>
#include <stdbool.h>
#include <sys/types.h>

#include "bapq.h"

/* Of a chunk of a plane. Only the store that sets HOME_ARRIVING writes there, until it sets another
 * state. */
enum { HOME_AWAY, HOME_ARRIVING, HOME_THERE };

/* One plane of a bank. */
typedef struct {
    dev_t device;
    ino_t inode;
    int64_t bytes;
    uint8_t *base;       /* reserved range, one byte per byte of the file; NULL: no such plane */
    bapq_extent *extent; /* (chunk_count,) */
    int32_t *claimants;  /* (chunk_count,) stores that claim it */
    uint8_t *state;      /* (chunk_count,) of the enum above */
} plane_home;

typedef struct homes {
    pthread_mutex_t lock;
    pthread_cond_t changed; /* anything that the lock guards changed */
    plane_home plane[BAPQ_PLANES];
    int32_t chunk_count;
    int64_t bytes_there; /* of all chunks that are at home */
    int64_t page_bytes;
    struct bapq_store *stores; /* that are open on them, linked by `neighbour` */
    int32_t owners;            /* stores, under the lock of the list of all homes */
    struct homes *next;        /* of all homes */
} homes;

/* The homes for planes of these files and extents (base, claimants and state are not looked at):
 * those that are there already, or new ones. Takes the extents in either case. NULL: no memory. */
homes *bapq_homes_join(plane_home planes[BAPQ_PLANES], int32_t chunk_count, bapq_error *error);
/* Frees the homes with their last owner. */
void bapq_homes_leave(homes *h);

/* ---- called with the lock held ---- */

/* Gives pages back to the system that no chunk of the plane needs. */
void bapq_homes_release_gaps(homes *h, int32_t plane);

#endif
