/* The core under load, for sanitizers: guests read and write while a plugin goes through checkpoints.
 *
 *     stress SECONDS        exit status 0, or a message and abort()
 *
 * First half: every guest owns the blocks of its number modulo GUESTS; it reads back what it wrote last, and whatever
 * it reads elsewhere must be some version of that block, never a hole.  The plugin prepares, arms, switches, reads the
 * frozen layer, commits in windows, and frees the overlay.  Beside each block's data stands a *shadow*, a plain word,
 * written where the data is written and read where the rules say that nobody can be writing: a sanitizer for threads
 * reports every such place that is not ordered by the rules' own operations.
 *
 * Second half: all guests write all blocks of one overlay, first writes and others; now and then one flushes and
 * looks whether the block it has just been answered for is in the durable map (F6, F7).
 */
#include "hooks.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "core.h"

enum { GUESTS = 3, BLOCKS = 256, SIZE = BLOCKS * 4096, WORDS = 512, LONG = 60000000, MANY = 32256, WINDOW = 16,
       NOTED = 1024 };

#define CHECK(true_, ...) ((true_) ? (void)0 : (fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), abort()))

struct layer {
    int fd, frozen;
    fp_file *file;
    fp_map *map;
    uint64_t words[WORDS];
    uint8_t backed[1], reserved[1], dirty[1];
    uint64_t shadow[BLOCKS];
};

static struct layer *by_fd[1024];
static fp_disk *disk;
static struct layer *base, *changed;
static int stop; /* atomic */
static bool quick; /* second half: no data */
static uint64_t served, passed, rounds; /* atomic */

static struct layer *make_layer(void)
{
    struct layer *new = calloc(1, sizeof *new);
    new->fd = memfd_create("layer", MFD_CLOEXEC);
    CHECK(new->fd >= 0 && new->fd < 1024 && ftruncate(new->fd, SIZE) == 0, "memfd");
    new->backed[0] = new->reserved[0] = 1;
    new->file = fp_file_new(new->fd);
    new->map = fp_map_new(new->words, MANY, new->backed);
    fp_map_durable(new->map, new->reserved, new->dirty, MANY);
    return by_fd[new->fd] = new;
}

static void free_layer(struct layer *layer)
{
    by_fd[layer->fd] = NULL;
    close(layer->fd);
    fp_file_free(layer->file);
    fp_map_free(layer->map);
    memset(layer, 0xee, sizeof *layer);
    free(layer);
}

ssize_t hooked_pread(int fd, void *buf, size_t count, off_t offset) { return pread(fd, buf, count, offset); }

ssize_t hooked_preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags)
{
    (void)flags;
    return preadv(fd, parts, count, offset);
}

ssize_t hooked_pwrite(int fd, const void *buf, size_t count, off_t offset)
{
    if (quick)
        return (ssize_t)count;
    struct layer *layer = by_fd[fd];
    CHECK(layer && !layer->frozen, "a write into a layer that is frozen or gone");
    layer->shadow[offset / 4096] = *(const uint64_t *)buf;
    return pwrite(fd, buf, count, offset);
}

int hooked_fallocate(int fd, int mode, off_t offset, off_t length)
{
    (void)fd, (void)mode, (void)offset, (void)length;
    return 0;
}

static uint32_t random_number(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

static bool stopped(void) { return __atomic_load_n(&stop, __ATOMIC_ACQUIRE); }

static void check_stamp(uint64_t stamp, uint64_t block)
{
    CHECK(stamp >> 32 == block + 1, "block %lu reads as %lx", block, stamp);
}

static void *guest(void *number)
{
    const uint64_t me = (uint64_t)(uintptr_t)number;
    uint64_t state = me + 1, versions[BLOCKS] = {0}, ours = 0, away = 0;
    static _Thread_local uint64_t buf[8 * 512];
    for (uint32_t turn = 1; !stopped(); turn++) {
        const uint64_t block = random_number(&state) % (BLOCKS / GUESTS) * GUESTS + me;
        if (turn % 2) {
            for (int i = 0; i < 512; i++)
                buf[i] = (block + 1) << 32 | turn;
            while (fp_write(disk, buf, 4096, block * 4096) == FP_PASS) {
                away++;
                sched_yield();
            }
            versions[block] = turn;
            ours++;
        } else if (fp_read(disk, buf, 4096, block * 4096) == FP_DONE) {
            check_stamp(buf[0], block);
            CHECK((uint32_t)buf[0] == versions[block] && buf[511] == buf[0], "block %lu: not the last version", block);
        }
        const uint64_t first = random_number(&state) % (BLOCKS - 8);
        if (turn % 16 == 0 && fp_read(disk, buf, sizeof buf, first * 4096) == FP_DONE)
            for (uint64_t i = 0; i < 8; i++)
                check_stamp(buf[i * 512], first + i);
    }
    __atomic_fetch_add(&served, ours, __ATOMIC_RELAXED);
    __atomic_fetch_add(&passed, away, __ATOMIC_RELAXED);
    return NULL;
}

static fp_view *publish(fp_view *old, struct layer *overlay, uint32_t target, bool commit, bool armed)
{
    fp_file *files[1] = {overlay ? overlay->file : NULL};
    fp_map *maps[1] = {overlay ? overlay->map : NULL};
    const uint32_t count = overlay != NULL;
    fp_view *new = fp_view_new(SIZE, count, files, maps, base->file, changed->map, target, count, commit, armed);
    fp_publish(disk, NULL);
    fp_publish(disk, new);
    CHECK(fp_settle(LONG), "requests do not leave");
    fp_view_free(old);
    return new;
}

static bool is_set(const struct layer *layer, uint64_t block)
{
    return __atomic_load_n(&layer->words[block / 64], __ATOMIC_ACQUIRE) >> (block % 64) & 1;
}

static void compare(const struct layer *layer, uint64_t block)
{
    uint64_t data[512];
    CHECK(pread(layer->fd, data, 4096, (off_t)block * 4096) == 4096, "pread");
    CHECK(data[0] == layer->shadow[block] && data[511] == data[0], "block %lu changes under the copy", block);
}

static uint32_t window_runs(uint64_t *runs, uint64_t first)
{
    uint32_t count = 0;
    for (uint64_t block = first; block < BLOCKS; block += WINDOW, count++)
        runs[2 * count] = block, runs[2 * count + 1] = block + 1;
    return count;
}

/* A window of the commit, every WINDOW-th block from *first*, copied beside writers; those that were noted stay. */
static void commit_watched(struct layer *overlay, uint64_t first)
{
    uint64_t runs[2 * BLOCKS / WINDOW] = {0}, noted[2 * NOTED], data[512];
    const uint32_t count = window_runs(runs, first);
    CHECK(fp_settle(LONG), "requests do not leave");
    fp_watch(disk, runs, count);
    CHECK(fp_settle(LONG), "requests do not leave");
    for (uint64_t block = first; block < BLOCKS; block += WINDOW)
        if (is_set(overlay, block)) {
            CHECK(pread(overlay->fd, data, 4096, (off_t)block * 4096) == 4096, "pread");
            CHECK(hooked_pwrite(base->fd, data, 4096, (off_t)block * 4096) == 4096, "pwrite");
        }
    fp_exclude(disk, runs, count);
    CHECK(fp_settle(LONG), "requests do not leave");
    const uint32_t found = fp_noted(disk, noted, NOTED);
    for (uint64_t block = first; block < BLOCKS; block += WINDOW) {
        bool left_alone = is_set(overlay, block);
        for (uint32_t i = 0; i < found; i++)
            left_alone = left_alone && (block < noted[2 * i] || block >= noted[2 * i + 1]);
        if (!left_alone)
            continue;
        CHECK(base->shadow[block] == overlay->shadow[block], "block %lu was written to and not noted", block);
        fp_map_clear(overlay->map, block, block + 1);
    }
    fp_include(disk, runs, count);
    fp_unwatch(disk, runs, count);
}

/* The same with its writers held off. */
static void commit_window(struct layer *overlay, uint64_t first)
{
    uint64_t runs[2 * BLOCKS / WINDOW] = {0};
    const uint32_t count = window_runs(runs, first);
    fp_exclude(disk, runs, count);
    CHECK(fp_settle(LONG), "requests do not leave");
    for (uint64_t block = first; block < BLOCKS; block += WINDOW) {
        if (!is_set(overlay, block))
            continue;
        uint64_t data[512];
        compare(overlay, block);
        CHECK(pread(overlay->fd, data, 4096, (off_t)block * 4096) == 4096, "pread");
        CHECK(hooked_pwrite(base->fd, data, 4096, (off_t)block * 4096) == 4096, "pwrite");
        fp_map_clear(overlay->map, block, block + 1);
    }
    fp_include(disk, runs, count);
}

static void *plugin(void *nothing)
{
    (void)nothing;
    fp_view *view = publish(NULL, NULL, 0, false, false);
    while (!stopped()) {
        struct layer *overlay = make_layer();
        view = publish(view, overlay, 1, false, false);
        view = publish(view, overlay, 1, false, true);
        view = publish(view, overlay, 0, false, false);
        base->frozen = 1;
        for (uint64_t block = 0; block < BLOCKS; block++)
            compare(base, block);
        base->frozen = 0;
        view = publish(view, overlay, 0, true, false);
        for (uint64_t first = 0; first < WINDOW; first++)
            commit_watched(overlay, first);
        for (uint64_t first = 0; first < WINDOW; first++)
            commit_window(overlay, first);
        for (uint64_t block = 0; block < BLOCKS; block++)
            CHECK(!is_set(overlay, block), "a commit view's target gained block %lu", block);
        view = publish(view, NULL, 0, false, false);
        free_layer(overlay);
        rounds++;
    }
    return view;
}

static pthread_mutex_t flushing = PTHREAD_MUTEX_INITIALIZER;
static uint64_t durable[WORDS];
static struct layer *target;
static pthread_barrier_t turn_over;

static void flush_and_look(uint64_t block)
{
    pthread_mutex_lock(&flushing);
    CHECK(fp_settle(LONG), "requests do not leave");
    sched_yield(); /* a request that comes now must leave its mark */
    if (fp_map_take(target->map, 0))
        for (int i = 0; i < WORDS; i++)
            durable[i] = __atomic_load_n(&target->words[i], __ATOMIC_ACQUIRE);
    CHECK(durable[block / 64] >> (block % 64) & 1, "block %lu was answered, flushed, and is not durable", block);
    pthread_mutex_unlock(&flushing);
}

/* Everybody writes the same blocks in the same order, so that they meet at them. */
static void *writer(void *number)
{
    static const char data[4096];
    uint64_t state = (uint64_t)(uintptr_t)number + 99, ours = 0;
    for (;;) {
        pthread_barrier_wait(&turn_over);
        if (number == NULL) {
            memset(durable, 0, sizeof durable);
            fp_map_clear(target->map, 0, MANY);
            fp_map_take(target->map, 0);
        }
        const bool over = stopped();
        pthread_barrier_wait(&turn_over);
        if (over)
            break;
        for (uint64_t block = 0; block < MANY; block += 1 + random_number(&state) % 3) {
            CHECK(fp_write(disk, data, 4096, block * 4096) == FP_DONE, "passed on");
            ours++;
            if (random_number(&state) % 4 == 0)
                flush_and_look(block);
        }
    }
    __atomic_fetch_add(&served, ours, __ATOMIC_RELAXED);
    return NULL;
}

static void sleep_for(double seconds)
{
    nanosleep(&(struct timespec){(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)}, NULL);
}

static fp_view *checkpoints(double seconds)
{
    pthread_t guests[GUESTS], driver;
    void *view;
    for (uint64_t block = 0; block < BLOCKS; block++) {
        uint64_t data[512];
        for (int i = 0; i < 512; i++)
            data[i] = (block + 1) << 32;
        CHECK(hooked_pwrite(base->fd, data, 4096, (off_t)block * 4096) == 4096, "pwrite");
    }
    pthread_create(&driver, NULL, plugin, NULL);
    for (uintptr_t i = 0; i < GUESTS; i++)
        pthread_create(&guests[i], NULL, guest, (void *)i);
    sleep_for(seconds);
    __atomic_store_n(&stop, 1, __ATOMIC_RELEASE);
    for (int i = 0; i < GUESTS; i++)
        pthread_join(guests[i], NULL);
    pthread_join(driver, &view);
    fp_publish(disk, NULL);
    return view;
}

static void flushes(double seconds)
{
    pthread_t writers[GUESTS];
    quick = true;
    __atomic_store_n(&stop, 0, __ATOMIC_RELEASE);
    target = make_layer();
    disk = fp_disk_new("many", (uint64_t)MANY * 4096);
    fp_view *view = fp_view_new((uint64_t)MANY * 4096, 1, &target->file, &target->map, base->file, changed->map, 0, 1,
                                false, false);
    fp_publish(disk, view);
    pthread_barrier_init(&turn_over, NULL, GUESTS);
    for (uintptr_t i = 0; i < GUESTS; i++)
        pthread_create(&writers[i], NULL, writer, (void *)i);
    sleep_for(seconds);
    __atomic_store_n(&stop, 1, __ATOMIC_RELEASE);
    for (int i = 0; i < GUESTS; i++)
        pthread_join(writers[i], NULL);
    fp_publish(disk, NULL);
    fp_view_free(view);
    free_layer(target);
}

int main(int count, char **arguments)
{
    const double seconds = count > 1 ? atof(arguments[1]) : 1;
    base = make_layer();
    changed = make_layer();
    disk = fp_disk_new("stress", SIZE);
    CHECK(fp_disk_find("stress") == disk && !fp_disk_find("other"), "fp_disk_find");
    fp_view_free(checkpoints(seconds / 2));
    printf("checkpoints: %lu rounds, %lu writes, passed on %lu times\n", rounds, served, passed);
    CHECK(rounds > 0 && served > 0, "nothing happened");
    served = 0;
    flushes(seconds / 2);
    printf("flushes: %lu writes\n", served);
    free_layer(base);
    free_layer(changed);
    return 0;
}
