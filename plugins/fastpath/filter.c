/* The nbdkit filter over blkckpt's plugin: asks the core (core.c), else the plugin, which may take its time: replies
 * that are held back leave first (wire.c, F11).
 *
 * It finds a connection's disk by the export's name among those that the plugin registered in this very library
 * (which it opens once more by its path).  A name that is not there, FUA and flushes are the plugin's business.
 */
#include "core.h"
#include "wire.h"

#include <nbdkit-filter.h>

static void unload(void) { fp_unload(); }

struct handle {
    fp_disk *disk; /* NULL: everything passes */
};

static void *fastpath_open(nbdkit_next_open *next, nbdkit_context *context, int readonly, const char *name, int is_tls)
{
    (void)is_tls;
    if (next(context, readonly, name) == -1)
        return NULL;
    struct handle *handle = calloc(1, sizeof *handle);
    if (handle)
        handle->disk = fp_disk_find(name);
    else
        nbdkit_error("calloc: %m");
    return handle;
}

static void fastpath_close(void *handle) { free(handle); }

static nbdkit_next *pass(nbdkit_next *next)
{
    fp_wire_release();
    return next;
}

static int fastpath_pread(nbdkit_next *next, void *handle, void *buf, uint32_t count, uint64_t offset, uint32_t flags,
                          int *err)
{
    fp_disk *disk = ((struct handle *)handle)->disk;
    if (disk && fp_read(disk, buf, count, offset) == FP_DONE)
        return 0;
    return pass(next)->pread(next, buf, count, offset, flags, err);
}

static int fastpath_pwrite(nbdkit_next *next, void *handle, const void *buf, uint32_t count, uint64_t offset,
                           uint32_t flags, int *err)
{
    fp_disk *disk = ((struct handle *)handle)->disk;
    if (disk && !(flags & NBDKIT_FLAG_FUA) && fp_write(disk, buf, count, offset) == FP_DONE)
        return 0;
    return pass(next)->pwrite(next, buf, count, offset, flags, err);
}

static int fastpath_trim(nbdkit_next *next, void *handle, uint32_t count, uint64_t offset, uint32_t flags, int *err)
{
    fp_disk *disk = ((struct handle *)handle)->disk;
    if (disk && !(flags & NBDKIT_FLAG_FUA) && fp_zero(disk, count, offset, true) == FP_DONE)
        return 0;
    return pass(next)->trim(next, count, offset, flags, err);
}

static int fastpath_zero(nbdkit_next *next, void *handle, uint32_t count, uint64_t offset, uint32_t flags, int *err)
{
    fp_disk *disk = ((struct handle *)handle)->disk;
    if (disk && !(flags & NBDKIT_FLAG_FUA) && fp_zero(disk, count, offset, flags & NBDKIT_FLAG_MAY_TRIM) == FP_DONE)
        return 0;
    return pass(next)->zero(next, count, offset, flags, err);
}

static int fastpath_flush(nbdkit_next *next, void *handle, uint32_t flags, int *err)
{
    (void)handle;
    return pass(next)->flush(next, flags, err);
}

static int fastpath_extents(nbdkit_next *next, void *handle, uint32_t count, uint64_t offset, uint32_t flags,
                            struct nbdkit_extents *extents, int *err)
{
    (void)handle;
    return pass(next)->extents(next, count, offset, flags, extents, err);
}

static int fastpath_cache(nbdkit_next *next, void *handle, uint32_t count, uint64_t offset, uint32_t flags, int *err)
{
    (void)handle;
    return pass(next)->cache(next, count, offset, flags, err);
}

static struct nbdkit_filter filter = {
    .name = "blkckpt-fastpath",
    .longname = "blkckpt's fast path",
    .description = "serve blkckpt's plain reads and writes without entering Python",
    .unload = unload,
    .open = fastpath_open,
    .close = fastpath_close,
    .pread = fastpath_pread,
    .pwrite = fastpath_pwrite,
    .trim = fastpath_trim,
    .zero = fastpath_zero,
    .flush = fastpath_flush,
    .extents = fastpath_extents,
    .cache = fastpath_cache,
};

NBDKIT_REGISTER_FILTER(filter)
