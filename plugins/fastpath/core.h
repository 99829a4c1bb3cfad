/* The fast path's core: what the nbdkit filter (filter.c) and the plugin's Python (blkckpt/disk/fastpath.py) call.
 *
 * No nbdkit in here, nor in wire.c, so that tests can link the two alone.  See core.c for the design.  Python calls
 * everything but the requests; objects are made and freed by Python, which keeps them alive while a request may use
 * them (rule F2).
 */
#ifndef BLKCKPT_FASTPATH_H
#define BLKCKPT_FASTPATH_H

#include <stdbool.h>
#include <stdint.h>

#define FP_ABI 2 /* Python refuses a library of another number. */

enum { FP_PASS = 0, FP_DONE = 1 }; /* of a request: ask the plugin; served */

typedef struct fp_file fp_file;
typedef struct fp_map fp_map;
typedef struct fp_view fp_view;
typedef struct fp_disk fp_disk;

int fp_abi(void);

/* Requests: any thread.  FP_PASS leaves nothing that the plugin, given the same request, would not do again. */
int fp_read(fp_disk *, void *buf, uint32_t count, uint64_t offset);
int fp_write(fp_disk *, const void *buf, uint32_t count, uint64_t offset);
int fp_zero(fp_disk *, uint32_t count, uint64_t offset, bool may_trim);

/* Disks live as long as the process: connections keep the pointer. */
fp_disk *fp_disk_new(const char *name, uint64_t size);
fp_disk *fp_disk_find(const char *name); /* the newest of that name, or NULL */
void fp_disk_forget(fp_disk *);          /* not found any more */
void fp_publish(fp_disk *, fp_view *);   /* NULL: every request passes */
void fp_exclude(fp_disk *, const uint64_t *runs, uint32_t count);
void fp_include(fp_disk *, const uint64_t *runs, uint32_t count);
void fp_watch(fp_disk *, const uint64_t *runs, uint32_t count); /* note who writes there; settle before relying on it */
uint32_t fp_noted(fp_disk *, uint64_t *runs, uint32_t most);    /* how many; while all of it is excluded, settled */
void fp_unwatch(fp_disk *, const uint64_t *runs, uint32_t count);
void fp_counters(const fp_disk *, uint64_t out[4]); /* reads, writes, bytes read, bytes written */

/* Wait until every request that was in flight at the call has left; 0 if *usec* were not enough (0: only look). */
int fp_settle(int64_t usec);

fp_file *fp_file_new(int fd);
void fp_file_free(fp_file *);
int fp_file_take_dirty(fp_file *); /* whether it was changed since the last call */
void fp_file_fail(fp_file *);      /* no more writes (D9) */

/* *words* and *backed*, *reserved*, *dirty* (one byte a page; the last two NULL without a durable map) stay the
 * caller's, who sets *backed* and *reserved* after the system call that allocated the page.  *slot_blocks* is how many
 * blocks a durable page has. */
fp_map *fp_map_new(uint64_t *words, uint64_t blocks, uint8_t *backed);
void fp_map_durable(fp_map *, uint8_t *reserved, uint8_t *dirty, uint32_t slot_blocks);
void fp_map_free(fp_map *);
void fp_map_set(fp_map *, uint64_t first, uint64_t end); /* backed and reserved by the caller */
void fp_map_clear(fp_map *, uint64_t first, uint64_t end);
void fp_map_merge(fp_map *, uint64_t word, const uint64_t *bits, uint64_t count);
int fp_map_take(fp_map *, uint64_t slot); /* whether the durable page was dirty; it is not any more */

/* Layers newest first; *floor* NULL: not a plain file. */
fp_view *fp_view_new(uint64_t size, uint32_t count, fp_file *const *files, fp_map *const *maps, fp_file *floor,
                     fp_map *changed, uint32_t target, uint32_t bottom, bool commit, bool armed);
void fp_view_free(fp_view *);

void fp_unload(void); /* before the object is unmapped: threads that end later do not call into it */

#endif
