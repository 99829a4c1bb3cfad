/* System calls of the core in the hands of a Python test: asked before each; and a thread that changes bits in C. */
#include "hooks.h"

#include <errno.h>
#include <stdint.h>

#include "core.h"

enum { READ, WRITE, ZERO, CACHED };

static int (*ask)(int kind, int fd, int64_t offset, int64_t length);

/* *callback* answers an errno, or 0 to go on; NULL: nobody is asked. */
void hook(int (*callback)(int, int, int64_t, int64_t)) { ask = callback; }

static int refused(int kind, int fd, off_t offset, size_t length)
{
    return ask && (errno = ask(kind, fd, offset, (int64_t)length)) != 0;
}

ssize_t hooked_pread(int fd, void *buf, size_t count, off_t offset)
{
    return refused(READ, fd, offset, count) ? -1 : pread(fd, buf, count, offset);
}

/* Not every file system knows RWF_NOWAIT: here all is in the page cache, unless the test says EAGAIN. */
ssize_t hooked_preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags)
{
    (void)flags;
    return refused(CACHED, fd, offset, parts->iov_len) ? -1 : preadv(fd, parts, count, offset);
}

ssize_t hooked_pwrite(int fd, const void *buf, size_t count, off_t offset)
{
    return refused(WRITE, fd, offset, count) ? -1 : pwrite(fd, buf, count, offset);
}

int hooked_fallocate(int fd, int mode, off_t offset, off_t length)
{
    return refused(ZERO, fd, offset, (size_t)length) ? -1 : fallocate(fd, mode, offset, length);
}

/* Set and clear *block* of *map* over and over, until *stop* or until it is not as just left; returns whether it was. */
uint64_t hammer(fp_map *map, const uint64_t *words, uint64_t block, const volatile int *stop)
{
    uint64_t wrong = 0;
    while (!*stop && !wrong) {
        fp_map_set(map, block, block + 1);
        wrong += !(((const volatile uint64_t *)words)[block >> 6] >> (block & 63) & 1);
        fp_map_clear(map, block, block + 1);
        wrong += ((const volatile uint64_t *)words)[block >> 6] >> (block & 63) & 1;
    }
    return wrong;
}
