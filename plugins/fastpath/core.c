/* The fast path: guest requests that need no decision, served without entering the interpreter.
 *
 * What it serves.  Reads whose blocks all lie in plain files, across any number of layers.  Writes, zeroes and trims
 * that need no copy-up, whose map pages are backed and reserved, while no exclusive ticket (a copy-up, a window of
 * the commit or the fill) holds one of their blocks and the disk is not armed.  That includes first writes: bits are
 * set with atomic operations.  A write to blocks that the commit watches is noted and served.  Everything else, every
 * error among it, is FP_PASS: the same request then goes to the plugin, which does it (again) from the start.
 *
 * What it knows.  A *view*, an immutable description of the disk's layers (blkckpt.disk.chain.View is the same
 * thing), published by the plugin.  Resolving and choosing where a write goes are the rules of chain.py, no others;
 * the comments name the function they follow.
 *
 * How it keeps apart from the plugin.  Rules F1 to F9 are stated in blkckpt/disk/__init__.py.  The mechanism is one
 * counter a thread (its *slot*), odd while a request is inside:
 *
 *     request                                      plugin
 *     slot := odd            (seq_cst)             view := new, or a block excluded   (seq_cst)
 *     read view, exclusions  (seq_cst)             for every slot: odd? wait until it moves   (seq_cst)
 *
 * In the one order of all seq_cst operations either the request's slot comes before the plugin's look at it, and the
 * plugin waits; or the look comes first, and the request sees the new view, or the exclusion.  Leaving is a release
 * that the plugin's look acquires, so what a request did happens before what the plugin does next.  A request never
 * waits for anybody; the plugin waits for at most the requests that were inside when it began (no starvation).
 *
 * Maps are shared with the interpreter, which reads bits by plain loads of bytes.  A reader that sees a bit set must
 * see the block's data: the data is written (a system call) before the bit is set with release order, and on every
 * machine Python runs on the reader's load is not reordered with the system call that follows it.
 *
 * Memory: a slot is 64 bytes, a disk 81 KiB; nothing is allocated by a request.  No lock is ever taken.
 */
#define _GNU_SOURCE
#include "core.h"
#include "wire.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "maps are read as 64-bit words and written as bytes");
_Static_assert(sizeof(off_t) == 8, "offsets");

enum {
    BLOCK_SHIFT = 12,
    BLOCK_MASK = (1 << BLOCK_SHIFT) - 1,
    PAGE_SHIFT = 15, /* blocks in 4096 bytes of bits: blockmap.PAGE_BLOCKS_SHIFT */
    SLOTS = 1024,    /* threads inside at a time; more are served by the plugin */
    STRIPE_SHIFT = 3,
    STRIPES = 8192, /* a window of 256 scattered runs turns away 3 % of the writes elsewhere */
    NOTES = 1024,   /* a window of 4 MiB meets some tens; those that find no room are passed on and noted there */
    SPIN_USEC = 20, /* a write of 4 KiB takes 8 */
};

struct fp_file {
    int fd;
    _Atomic uint8_t dirty, failed;
};

struct fp_map {
    _Atomic uint64_t *words;
    uint64_t blocks;
    _Atomic uint8_t *backed, *reserved, *dirty;
    uint32_t slot_blocks;
};

struct fp_view {
    uint64_t size;
    uint32_t count, target, bottom;
    bool commit, armed;
    fp_file *floor;
    fp_map *changed;
    struct layer {
        fp_file *file;
        fp_map *map;
    } layers[];
};

struct fp_disk {
    char name[72]; /* names have at most 64 characters */
    uint64_t size;
    _Atomic(fp_view *) view;
    _Atomic(fp_disk *) next;
    _Atomic bool forgotten;
    _Atomic uint32_t excluded;          /* exclusive tickets: the stripes need not be looked at when there is none */
    _Atomic uint32_t stripes[STRIPES];  /* exclusive tickets by block >> STRIPE_SHIFT, folded */
    _Atomic uint32_t watching, noted;
    _Atomic uint32_t watched[STRIPES];  /* as *stripes*, of the window that the commit watches */
    struct {
        uint64_t first, end;
    } notes[NOTES];
    _Atomic uint64_t reads, writes, read_bytes, written_bytes;
};

int fp_abi(void) { return FP_ABI; }

/* ---- slots ---- */

static struct slot {
    _Alignas(64) _Atomic uint64_t turn; /* odd: a request is inside */
    _Atomic uint8_t taken;
} slots[SLOTS];
static _Atomic uint32_t used; /* slots below were ever taken */

static _Thread_local struct slot *mine;
static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static _Atomic bool have_key;

static void give_slot(void *slot) { atomic_store_explicit(&((struct slot *)slot)->taken, 0, memory_order_release); }

static void make_key(void) { atomic_store(&have_key, pthread_key_create(&key, give_slot) == 0); }

void fp_unload(void)
{
    if (atomic_exchange(&have_key, false))
        pthread_key_delete(key);
}

static struct slot *take_slot(void)
{
    pthread_once(&once, make_key);
    for (uint32_t i = 0; atomic_load(&have_key) && i < SLOTS; i++) {
        uint8_t free = 0;
        if (!atomic_compare_exchange_strong(&slots[i].taken, &free, 1))
            continue;
        if (pthread_setspecific(key, &slots[i]) != 0) {
            give_slot(&slots[i]);
            return NULL;
        }
        uint32_t before = atomic_load(&used);
        while (before <= i && !atomic_compare_exchange_weak(&used, &before, i + 1))
            ;
        return mine = &slots[i];
    }
    return NULL;
}

/* The view of this request, or NULL: nothing may be served now.  F1. */
static const fp_view *enter(fp_disk *disk)
{
    struct slot *slot = mine ? mine : take_slot();
    if (!slot)
        return NULL;
    atomic_fetch_add(&slot->turn, 1);
    const fp_view *view = atomic_load(&disk->view);
    if (!view)
        atomic_fetch_add_explicit(&slot->turn, 1, memory_order_release);
    return view;
}

static void leave(void) { atomic_fetch_add_explicit(&mine->turn, 1, memory_order_release); }

static int64_t now_usec(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000) + t.tv_nsec / 1000;
}

/* Looks for as long as a request takes that runs, and then sleeps: one that does not run waits for the disk, or for
 * this very processor, which sched_yield() need not give it (EEVDF: it kept it for 2 ms, of a commit's every window). */
int fp_settle(int64_t usec)
{
    const int64_t began = usec > 0 ? now_usec() : 0;
    const uint32_t count = atomic_load(&used);
    for (uint32_t i = 0; i < count; i++) {
        const uint64_t turn = atomic_load(&slots[i].turn);
        while (turn & 1 && atomic_load_explicit(&slots[i].turn, memory_order_acquire) == turn) {
            const int64_t spent = usec > 0 ? now_usec() - began : 0;
            if (spent >= usec)
                return 0;
            if (spent >= SPIN_USEC)
                nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
        }
    }
    return 1;
}

/* ---- disks ---- */

static _Atomic(fp_disk *) disks; /* a list; forgotten ones stay linked */

fp_disk *fp_disk_new(const char *name, uint64_t size)
{
    fp_disk *disk = calloc(1, sizeof *disk);
    if (!disk || strlen(name) >= sizeof disk->name) {
        free(disk);
        return NULL;
    }
    strcpy(disk->name, name);
    disk->size = size;
    atomic_store(&disk->next, atomic_load(&disks));
    fp_disk *head = atomic_load(&disk->next);
    while (!atomic_compare_exchange_weak(&disks, &head, disk))
        atomic_store(&disk->next, head);
    return disk;
}

fp_disk *fp_disk_find(const char *name)
{
    for (fp_disk *disk = atomic_load(&disks); disk; disk = atomic_load(&disk->next))
        if (!atomic_load(&disk->forgotten) && strcmp(disk->name, name) == 0)
            return disk;
    return NULL;
}

void fp_disk_forget(fp_disk *disk)
{
    fp_publish(disk, NULL);
    atomic_store(&disk->forgotten, true);
}

void fp_publish(fp_disk *disk, fp_view *view) { atomic_store(&disk->view, view); }

void fp_counters(const fp_disk *disk, uint64_t out[4])
{
    out[0] = atomic_load_explicit(&disk->reads, memory_order_relaxed);
    out[1] = atomic_load_explicit(&disk->writes, memory_order_relaxed);
    out[2] = atomic_load_explicit(&disk->read_bytes, memory_order_relaxed);
    out[3] = atomic_load_explicit(&disk->written_bytes, memory_order_relaxed);
}

static void count(_Atomic uint64_t *requests, _Atomic uint64_t *bytes, uint64_t length)
{
    atomic_fetch_add_explicit(requests, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(bytes, length, memory_order_relaxed);
}

/* ---- exclusion (F5) ---- */

/* The stripes of blocks [first, end) are *low* … *high*, modulo STRIPES. */
static void stripes(uint64_t first, uint64_t end, uint64_t *low, uint64_t *high)
{
    *low = first >> STRIPE_SHIFT;
    *high = (end - 1) >> STRIPE_SHIFT;
    if (*high - *low >= STRIPES)
        *high = *low + STRIPES - 1;
}

static void add_runs(_Atomic uint32_t *table, const uint64_t *runs, uint32_t count, uint32_t step)
{
    for (uint32_t i = 0; i < count; i++) {
        uint64_t low, high;
        stripes(runs[2 * i], runs[2 * i + 1], &low, &high);
        for (; low <= high; low++)
            atomic_fetch_add(&table[low % STRIPES], step);
    }
}

void fp_exclude(fp_disk *disk, const uint64_t *runs, uint32_t count)
{
    add_runs(disk->stripes, runs, count, 1);
    atomic_fetch_add(&disk->excluded, 1);
}

void fp_include(fp_disk *disk, const uint64_t *runs, uint32_t count)
{
    atomic_fetch_sub(&disk->excluded, 1);
    add_runs(disk->stripes, runs, count, UINT32_MAX);
}

static bool meets(_Atomic uint32_t *table, uint64_t first, uint64_t end)
{
    uint64_t low, high;
    stripes(first, end, &low, &high);
    for (; low <= high; low++)
        if (atomic_load(&table[low % STRIPES]))
            return true;
    return false;
}

static bool excluded(fp_disk *disk, uint64_t first, uint64_t end)
{
    return atomic_load(&disk->excluded) != 0 && meets(disk->stripes, first, end);
}

/* ---- the commit's watch (F5) ---- */

void fp_watch(fp_disk *disk, const uint64_t *runs, uint32_t count)
{
    atomic_store(&disk->noted, 0);
    add_runs(disk->watched, runs, count, 1);
    atomic_store(&disk->watching, 1);
}

void fp_unwatch(fp_disk *disk, const uint64_t *runs, uint32_t count)
{
    atomic_store(&disk->watching, 0);
    add_runs(disk->watched, runs, count, UINT32_MAX);
}

/* Whether the write may go on: it is noted if it has to be.  Before its data. */
static bool note(fp_disk *disk, uint64_t first, uint64_t end)
{
    if (atomic_load(&disk->watching) == 0 || !meets(disk->watched, first, end))
        return true;
    const uint32_t at = atomic_fetch_add(&disk->noted, 1);
    if (at >= NOTES)
        return false;
    disk->notes[at].first = first;
    disk->notes[at].end = end;
    return true;
}

/* Every write that noted anything is turned away now, or has left: their stores happen before the settle's look. */
uint32_t fp_noted(fp_disk *disk, uint64_t *runs, uint32_t most)
{
    uint32_t count = atomic_load(&disk->noted);
    count = count < NOTES ? count : NOTES;
    for (uint32_t i = 0; i < count && i < most; i++) {
        runs[2 * i] = disk->notes[i].first;
        runs[2 * i + 1] = disk->notes[i].end;
    }
    return count;
}

/* ---- files ---- */

fp_file *fp_file_new(int fd)
{
    fp_file *file = calloc(1, sizeof *file);
    if (file)
        file->fd = fd;
    return file;
}

void fp_file_free(fp_file *file) { free(file); }

int fp_file_take_dirty(fp_file *file) { return atomic_exchange(&file->dirty, 0); }

void fp_file_fail(fp_file *file) { atomic_store(&file->failed, 1); }

/* As pread().  While a reply is held back it is asked first for what needs no waiting (F11). */
static ssize_t read_some(const fp_file *file, char *buf, uint64_t length, off_t offset)
{
    if (fp_wire_holds()) {
        if (length <= FP_WIRE_BRIEF) {
            const struct iovec part = {buf, length};
            const ssize_t done = preadv2(file->fd, &part, 1, offset, RWF_NOWAIT);
            if (done > 0)
                return done;
        }
        fp_wire_release();
    }
    return pread(file->fd, buf, length, offset);
}

/* All of it, or false: what went wrong is found and told by the plugin, which tries again. */
static bool read_all(const fp_file *file, char *buf, uint64_t length, uint64_t offset)
{
    while (length) {
        ssize_t done = read_some(file, buf, length, (off_t)offset);
        if (done <= 0)
            return false;
        buf += done;
        offset += (uint64_t)done;
        length -= (uint64_t)done;
    }
    return true;
}

static bool write_all(const fp_file *file, const char *buf, uint64_t length, uint64_t offset)
{
    while (length) {
        ssize_t done = pwrite(file->fd, buf, length, (off_t)offset);
        if (done <= 0)
            return false;
        buf += done;
        offset += (uint64_t)done;
        length -= (uint64_t)done;
    }
    return true;
}

/* ---- maps (blkckpt.disk.blockmap) ---- */

fp_map *fp_map_new(uint64_t *words, uint64_t blocks, uint8_t *backed)
{
    fp_map *map = calloc(1, sizeof *map);
    if (map) {
        map->words = (_Atomic uint64_t *)words;
        map->blocks = blocks;
        map->backed = (_Atomic uint8_t *)backed;
    }
    return map;
}

void fp_map_durable(fp_map *map, uint8_t *reserved, uint8_t *dirty, uint32_t slot_blocks)
{
    map->reserved = (_Atomic uint8_t *)reserved;
    map->dirty = (_Atomic uint8_t *)dirty;
    map->slot_blocks = slot_blocks;
}

void fp_map_free(fp_map *map) { free(map); }

static bool is_backed(const fp_map *map, uint64_t block)
{
    return atomic_load_explicit(&map->backed[block >> PAGE_SHIFT], memory_order_acquire);
}

/* The first block of [from, end) whose bit is *set*, else *end*.  Unbacked pages are clear and not touched. */
static uint64_t find(const fp_map *map, uint64_t from, uint64_t end, bool set)
{
    while (from < end) {
        if (!is_backed(map, from)) {
            if (!set)
                return from;
            from = ((from >> PAGE_SHIFT) + 1) << PAGE_SHIFT;
            continue;
        }
        uint64_t word = atomic_load_explicit(&map->words[from >> 6], memory_order_acquire);
        word = (set ? word : ~word) & ~UINT64_C(0) << (from & 63);
        if (word) {
            from = (from & ~UINT64_C(63)) + (uint64_t)__builtin_ctzll(word);
            break;
        }
        from = (from | 63) + 1;
    }
    return from < end ? from : end;
}

static bool all_set(const fp_map *map, uint64_t first, uint64_t end) { return find(map, first, end, false) == end; }

static bool is_set(const fp_map *map, uint64_t block) { return find(map, block, block + 1, true) == block; }

/* Whether bits of the range may be set here: never a first touch of a page of the live map or of the durable one,
 * which may find no space (D10). */
static bool ready(const fp_map *map, uint64_t first, uint64_t end)
{
    for (uint64_t page = first >> PAGE_SHIFT; page <= (end - 1) >> PAGE_SHIFT; page++)
        if (!is_backed(map, page << PAGE_SHIFT))
            return false;
    if (map->reserved)
        for (uint64_t slot = first / map->slot_blocks; slot <= (end - 1) / map->slot_blocks; slot++)
            if (!atomic_load_explicit(&map->reserved[slot], memory_order_acquire))
                return false;
    return true;
}

/* Bits, then the pages' marks: a flush that takes the mark sees the bits (F6). */
static void change_bits(fp_map *map, uint64_t first, uint64_t end, bool set)
{
    for (uint64_t at = first; at < end;) {
        const uint64_t next = (at | 63) + 1, stop = next < end ? next : end;
        uint64_t mask = ~UINT64_C(0) << (at & 63);
        if (stop < next)
            mask &= ~UINT64_C(0) >> (next - stop);
        if (set)
            atomic_fetch_or_explicit(&map->words[at >> 6], mask, memory_order_release);
        else if (is_backed(map, at))
            atomic_fetch_and_explicit(&map->words[at >> 6], ~mask, memory_order_release);
        at = stop;
    }
    if (map->dirty)
        for (uint64_t slot = first / map->slot_blocks; slot <= (end - 1) / map->slot_blocks; slot++)
            atomic_store(&map->dirty[slot], 1);
}

void fp_map_set(fp_map *map, uint64_t first, uint64_t end) { change_bits(map, first, end, true); }

void fp_map_clear(fp_map *map, uint64_t first, uint64_t end) { change_bits(map, first, end, false); }

void fp_map_merge(fp_map *map, uint64_t word, const uint64_t *bits, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        if (bits[i])
            atomic_fetch_or_explicit(&map->words[word + i], bits[i], memory_order_release);
}

int fp_map_take(fp_map *map, uint64_t slot) { return atomic_exchange(&map->dirty[slot], 0); }

/* ---- views ---- */

fp_view *fp_view_new(uint64_t size, uint32_t count, fp_file *const *files, fp_map *const *maps, fp_file *floor,
                     fp_map *changed, uint32_t target, uint32_t bottom, bool commit, bool armed)
{
    fp_view *view = calloc(1, sizeof *view + count * sizeof view->layers[0]);
    if (!view)
        return NULL;
    view->size = size;
    view->count = count;
    view->target = target;
    view->bottom = bottom;
    view->commit = commit;
    view->armed = armed;
    view->floor = floor;
    view->changed = changed;
    for (uint32_t i = 0; i < count; i++)
        view->layers[i] = (struct layer){files[i], maps[i]};
    return view;
}

void fp_view_free(fp_view *view) { free(view); }

/* ---- reads (chain.read) ---- */

/* The file that holds *block*, and in *stop* up to where it holds what follows. */
static const fp_file *resolve(const fp_view *view, uint64_t block, uint64_t *stop)
{
    for (uint32_t i = 0; i < view->count; i++) {
        const fp_map *map = view->layers[i].map;
        const uint64_t next = find(map, block, *stop, true);
        if (next == block) {
            *stop = find(map, block, *stop, false);
            if (*stop == block) /* cleared between the looks: the commit moved it down, it is in both */
                *stop = block + 1;
            return view->layers[i].file;
        }
        *stop = next;
    }
    return view->floor;
}

static bool read_view(const fp_view *view, char *buf, uint64_t length, uint64_t offset)
{
    const uint64_t until = offset + length, end = (until + BLOCK_MASK) >> BLOCK_SHIFT;
    while (offset < until) {
        uint64_t stop = end;
        const fp_file *file = resolve(view, offset >> BLOCK_SHIFT, &stop);
        const uint64_t high = stop << BLOCK_SHIFT, part = (high < until ? high : until) - offset;
        if (!file || !read_all(file, buf, part, offset))
            return false;
        buf += part;
        offset += part;
    }
    return true;
}

static bool inside(const fp_disk *disk, uint64_t length, uint64_t offset)
{
    return length && offset < disk->size && length <= disk->size - offset;
}

int fp_read(fp_disk *disk, void *buf, uint32_t length, uint64_t offset)
{
    const fp_view *view;
    if (!inside(disk, length, offset) || !(view = enter(disk)))
        return FP_PASS;
    const bool done = read_view(view, buf, length, offset);
    leave();
    if (done)
        count(&disk->reads, &disk->read_bytes, length);
    return done ? FP_DONE : FP_PASS;
}

/* ---- writes (chain.write, chain.zero) ---- */

struct change {
    const char *data; /* NULL: zeros */
    int mode;         /* of fallocate, for zeros */
    uint64_t start;   /* where *data* begins on the disk */
};

static bool put(fp_file *file, const struct change *what, uint64_t offset, uint64_t length)
{
    if (!what->data || length > FP_WIRE_BRIEF)
        fp_wire_release();
    const bool done = what->data ? write_all(file, what->data + (offset - what->start), length, offset)
                                 : fallocate(file->fd, what->mode, (off_t)offset, (off_t)length) == 0;
    atomic_store(&file->dirty, 1); /* after the change, whatever came of it: a sync that begins now covers it */
    return done;
}

/* Whether a write of these blocks that covers the outer ones in part must fill one of them first. */
static bool needs_copy_up(const fp_view *view, const fp_map *map, uint64_t offset, uint64_t until)
{
    if (offset & BLOCK_MASK && !is_set(map, offset >> BLOCK_SHIFT))
        return true;
    return until & BLOCK_MASK && until != view->size && !is_set(map, until >> BLOCK_SHIFT);
}

/* chain.write_at, chain.zero_at.  Order: changed bits, data, the file's mark, present bits, the pages' marks (F6). */
static bool change_at(const fp_view *view, uint32_t index, const struct change *what, uint64_t offset, uint64_t until)
{
    const uint64_t first = offset >> BLOCK_SHIFT, end = (until + BLOCK_MASK) >> BLOCK_SHIFT;
    const bool overlay = index < view->count;
    fp_file *file = overlay ? view->layers[index].file : view->floor;
    fp_map *map = overlay ? view->layers[index].map : NULL;
    if (!file || atomic_load(&file->failed))
        return false;
    const bool fresh = map && !all_set(map, first, end);
    if (fresh && (needs_copy_up(view, map, offset, until) || !ready(map, first, end)))
        return false;
    if (index == view->bottom && !all_set(view->changed, first, end)) {
        if (!ready(view->changed, first, end))
            return false;
        change_bits(view->changed, first, end, true);
    }
    if (!put(file, what, offset, until - offset))
        return false;
    if (fresh)
        change_bits(map, first, end, true);
    return true;
}

static bool change_view(const fp_view *view, const struct change *what, uint64_t offset, uint64_t until)
{
    if (view->target == view->count || !view->commit)
        return change_at(view, view->target, what, offset, until);
    /* A commit view: blocks present in the target go there, others below.  No bit is cleared meanwhile: the window
     * that clears it excludes its blocks (F5). */
    const fp_map *map = view->layers[view->target].map;
    const uint64_t end = (until + BLOCK_MASK) >> BLOCK_SHIFT;
    while (offset < until) {
        const uint64_t block = offset >> BLOCK_SHIFT;
        const bool present = is_set(map, block);
        const uint64_t high = find(map, block, end, !present) << BLOCK_SHIFT, stop = high < until ? high : until;
        if (!change_at(view, view->target + !present, what, offset, stop))
            return false;
        offset = stop;
    }
    return true;
}

static int change(fp_disk *disk, const struct change *what, uint64_t length, uint64_t offset)
{
    const fp_view *view;
    if (!inside(disk, length, offset) || !(view = enter(disk)))
        return FP_PASS;
    const uint64_t until = offset + length;
    const uint64_t first = offset >> BLOCK_SHIFT, end = (until + BLOCK_MASK) >> BLOCK_SHIFT;
    const bool done = !view->armed && !excluded(disk, first, end) && note(disk, first, end) &&
                      change_view(view, what, offset, until);
    leave();
    if (done)
        count(&disk->writes, &disk->written_bytes, what->data ? length : 0);
    return done ? FP_DONE : FP_PASS;
}

int fp_write(fp_disk *disk, const void *buf, uint32_t length, uint64_t offset)
{
    return change(disk, &(struct change){.data = buf, .start = offset}, length, offset);
}

int fp_zero(fp_disk *disk, uint32_t length, uint64_t offset, bool may_trim)
{
    const int mode = (may_trim ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE) | FALLOC_FL_KEEP_SIZE;
    return change(disk, &(struct change){.mode = mode, .start = offset}, length, offset);
}
