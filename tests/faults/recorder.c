/* Record what a program does to files below one directory, in the order in which it happened.
 *
 * Preloaded (LD_PRELOAD) into the program under test.  Every libc call that changes a file or a name below
 * RECORD_ROOT, or that makes one durable, is performed and then appended to RECORD_LOG, both under one lock (a
 * mutex between threads, flock between processes), so that the log's order is an order in which the calls took
 * effect.  Nothing is simulated here: tests/faults/crash.py replays the log and decides what a power cut leaves.
 *
 * Not seen: stores through a shared mapping, and calls that a library makes past the dynamic linker (the system
 * call instruction; dlsym on libc's own handle).  The harness therefore replays every whole log and compares the
 * result with the real files before it believes the log.
 *
 * A record is: u32 kind, u32 length of name 1, u32 length of name 2, u32 zero, u64 inode, u64 offset, u64 count,
 * then name 1, name 2, and for WRITE and MARK `count` bytes.  Host byte order.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
#include <linux/falloc.h>

enum { CREATE = 1, MKDIR, RENAME, LINK, UNLINK, RMDIR, WRITE, TRUNCATE, ZERO, ALLOCATE, SYNC, SYNC_ALL, MARK };

struct record {
    uint32_t kind, name1, name2, zero;
    uint64_t inode, offset, count;
};

static const char *root;
static size_t root_length;
static int log_fd = -1;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name)
{
    void *found = dlsym(RTLD_NEXT, name);
    if (found == NULL)
        abort();
    return found;
}

__attribute__((constructor)) static void start(void)
{
    const char *path = getenv("RECORD_LOG");
    root = getenv("RECORD_ROOT");
    if (root == NULL || path == NULL)
        return;
    root_length = strlen(root);
    log_fd = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (log_fd < 0)
        abort();
    /* Out of the way of programs that close or number descriptors themselves. */
    int high = syscall(SYS_fcntl, log_fd, F_DUPFD_CLOEXEC, 900);
    if (high >= 0) {
        syscall(SYS_close, log_fd);
        log_fd = high;
    }
}

static void lock(void)
{
    pthread_mutex_lock(&mutex);
    if (log_fd >= 0)
        flock(log_fd, LOCK_EX);
}

static void unlock(void)
{
    int saved = errno;
    if (log_fd >= 0)
        flock(log_fd, LOCK_UN);
    pthread_mutex_unlock(&mutex);
    errno = saved;
}

static int inside(const char *path)
{
    return log_fd >= 0 && strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == 0);
}

/* The absolute path of descriptor `fd`; false when it is not below the root. */
static int descriptor_path(int fd, char *out)
{
    char link[64];
    if (log_fd < 0)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, out, PATH_MAX - 1);
    if (length <= 0)
        return 0;
    out[length] = 0;
    return inside(out);
}

/* The absolute path of `path` as seen from directory `fd`; false when it is not below the root. */
static int absolute(int fd, const char *path, char *out)
{
    if (log_fd < 0 || path == NULL)
        return 0;
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return inside(out);
    }
    char base[PATH_MAX];
    if (fd == AT_FDCWD) {
        if (getcwd(base, sizeof base) == NULL)
            return 0;
    } else if (!descriptor_path(fd, base))
        return 0;
    if (snprintf(out, PATH_MAX, "%s/%s", base, path) >= PATH_MAX)
        return 0;
    return inside(out);
}

static uint64_t inode_of(int fd)
{
    struct stat info;
    return fstat(fd, &info) == 0 ? info.st_ino : 0;
}

static void put(int kind, const char *name1, const char *name2, uint64_t inode, uint64_t offset,
                const struct iovec *data, int pieces, uint64_t count)
{
    struct record head = { kind, name1 ? strlen(name1) : 0, name2 ? strlen(name2) : 0, 0, inode, offset, count };
    size_t size = sizeof head + head.name1 + head.name2 + (data ? count : 0);
    char *buffer = malloc(size), *at = buffer;
    if (buffer == NULL)
        abort();
    memcpy(at, &head, sizeof head), at += sizeof head;
    memcpy(at, name1 ? name1 : "", head.name1), at += head.name1;
    memcpy(at, name2 ? name2 : "", head.name2), at += head.name2;
    for (uint64_t left = data ? count : 0; left > 0; data++, pieces--) {
        size_t part = data->iov_len < left ? data->iov_len : left;
        if (pieces == 0)
            abort();
        memcpy(at, data->iov_base, part), at += part, left -= part;
    }
    if (syscall(SYS_write, log_fd, buffer, size) != (ssize_t)size)
        abort();
    free(buffer);
}

/* For the program under test: a remark of its own, in order with everything else. */
void record_mark(const char *text, size_t length)
{
    struct iovec data = { (void *)text, length };
    if (log_fd < 0)
        return;
    lock();
    put(MARK, NULL, NULL, 0, 0, &data, 1, length);
    unlock();
}

/* ---- names ---- */

static int do_open(int directory, const char *path, int flags, mode_t mode)
{
    char full[PATH_MAX];
    struct stat before;
    int (*call)(int, const char *, int, ...) = real("openat");
    if (!(flags & (O_CREAT | O_TRUNC)) || (flags & O_TMPFILE) == O_TMPFILE || !absolute(directory, path, full))
        return call(directory, path, flags, mode);
    lock();
    int existed = lstat(full, &before) == 0;
    int fd = call(directory, path, flags, mode);
    if (fd >= 0 && !existed)
        put(CREATE, full, NULL, inode_of(fd), 0, NULL, 0, 0);
    else if (fd >= 0 && (flags & O_TRUNC))
        put(TRUNCATE, full, NULL, inode_of(fd), 0, NULL, 0, 0);
    unlock();
    return fd;
}

#define MODE(last)                              \
    mode_t mode = 0;                            \
    if (flags & (O_CREAT | O_TMPFILE)) {        \
        va_list list;                           \
        va_start(list, last);                   \
        mode = va_arg(list, mode_t);            \
        va_end(list);                           \
    }

int open(const char *path, int flags, ...)
{
    MODE(flags)
    return do_open(AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...)
{
    MODE(flags)
    return do_open(AT_FDCWD, path, flags | O_LARGEFILE, mode);
}
int openat(int directory, const char *path, int flags, ...)
{
    MODE(flags)
    return do_open(directory, path, flags, mode);
}
int openat64(int directory, const char *path, int flags, ...)
{
    MODE(flags)
    return do_open(directory, path, flags | O_LARGEFILE, mode);
}
int creat(const char *path, mode_t mode) { return do_open(AT_FDCWD, path, O_CREAT | O_TRUNC | O_WRONLY, mode); }

static int two_names(int kind, int from, const char *old, int to, const char *new, unsigned flags)
{
    char full_old[PATH_MAX], full_new[PATH_MAX];
    int in_old = absolute(from, old, full_old), in_new = absolute(to, new, full_new);
    lock();
    int result = kind == RENAME ? (int)syscall(SYS_renameat2, from, old, to, new, flags)
                                : (int)syscall(SYS_linkat, from, old, to, new, flags);
    if (result == 0 && (in_old || in_new)) {
        struct stat info;
        put(kind, in_old ? full_old : "", in_new ? full_new : "", lstat(full_new, &info) == 0 ? info.st_ino : 0, 0,
            NULL, 0, 0);
    }
    unlock();
    return result;
}

int rename(const char *old, const char *new) { return two_names(RENAME, AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return two_names(RENAME, from, old, to, new, 0); }
int renameat2(int from, const char *old, int to, const char *new, unsigned flags)
{
    return two_names(RENAME, from, old, to, new, flags);
}
int link(const char *old, const char *new) { return two_names(LINK, AT_FDCWD, old, AT_FDCWD, new, 0); }
int linkat(int from, const char *old, int to, const char *new, int flags)
{
    return two_names(LINK, from, old, to, new, flags);
}

static int one_name(int kind, int directory, const char *path, int flags, mode_t mode)
{
    char full[PATH_MAX];
    int in = absolute(directory, path, full);
    lock();
    int result = kind == MKDIR ? (int)syscall(SYS_mkdirat, directory, path, mode)
                               : (int)syscall(SYS_unlinkat, directory, path, flags);
    if (result == 0 && in)
        put(kind, full, NULL, 0, 0, NULL, 0, 0);
    unlock();
    return result;
}

int unlink(const char *path) { return one_name(UNLINK, AT_FDCWD, path, 0, 0); }
int unlinkat(int directory, const char *path, int flags)
{
    return one_name(flags & AT_REMOVEDIR ? RMDIR : UNLINK, directory, path, flags, 0);
}
int rmdir(const char *path) { return one_name(RMDIR, AT_FDCWD, path, AT_REMOVEDIR, 0); }
int mkdir(const char *path, mode_t mode) { return one_name(MKDIR, AT_FDCWD, path, 0, mode); }
int mkdirat(int directory, const char *path, mode_t mode) { return one_name(MKDIR, directory, path, 0, mode); }

/* ---- data ---- */

/* offset < 0: at the file's own position, or its end with O_APPEND. */
static ssize_t do_write(int fd, const struct iovec *data, int pieces, off_t offset)
{
    char path[PATH_MAX];
    if (!descriptor_path(fd, path))
        return offset < 0 ? syscall(SYS_writev, fd, data, pieces)
                          : syscall(SYS_pwritev, fd, data, pieces, offset, 0);
    lock();
    off_t at = offset;
    if (at < 0) {
        struct stat info;
        int append = syscall(SYS_fcntl, fd, F_GETFL) & O_APPEND;
        at = append && fstat(fd, &info) == 0 ? info.st_size : lseek(fd, 0, SEEK_CUR);
    }
    ssize_t result = offset < 0 ? syscall(SYS_writev, fd, data, pieces)
                                : syscall(SYS_pwritev, fd, data, pieces, offset, 0);
    if (result > 0)
        put(WRITE, NULL, NULL, inode_of(fd), at, data, pieces, result);
    unlock();
    return result;
}

ssize_t write(int fd, const void *data, size_t count)
{
    struct iovec piece = { (void *)data, count };
    if (log_fd < 0)
        return syscall(SYS_write, fd, data, count);
    return do_write(fd, &piece, 1, -1);
}
ssize_t writev(int fd, const struct iovec *data, int pieces) { return do_write(fd, data, pieces, -1); }
ssize_t pwrite(int fd, const void *data, size_t count, off_t offset)
{
    struct iovec piece = { (void *)data, count };
    return do_write(fd, &piece, 1, offset);
}
ssize_t pwrite64(int fd, const void *data, size_t count, off64_t offset) { return pwrite(fd, data, count, offset); }
ssize_t pwritev(int fd, const struct iovec *data, int pieces, off_t offset) { return do_write(fd, data, pieces, offset); }
ssize_t pwritev64(int fd, const struct iovec *data, int pieces, off64_t offset) { return do_write(fd, data, pieces, offset); }
ssize_t pwritev2(int fd, const struct iovec *data, int pieces, off_t offset, int flags)
{
    if (flags != 0)
        abort(); /* not modelled; teach crash.py first */
    return do_write(fd, data, pieces, offset);
}
ssize_t pwritev64v2(int fd, const struct iovec *data, int pieces, off64_t offset, int flags)
{
    return pwritev2(fd, data, pieces, offset, flags);
}

/* After the kernel moved `count` bytes into the file at `at`: log what is there now. */
static void put_copied(int fd, off_t at, size_t count)
{
    char link[64], *buffer = malloc(count);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd); /* a second descriptor: the first may be write-only */
    int reader = syscall(SYS_openat, AT_FDCWD, link, O_RDONLY | O_CLOEXEC);
    if (buffer == NULL || reader < 0 || syscall(SYS_pread64, reader, buffer, count, at) != (ssize_t)count)
        abort();
    struct iovec piece = { buffer, count };
    put(WRITE, NULL, NULL, inode_of(fd), at, &piece, 1, count);
    syscall(SYS_close, reader);
    free(buffer);
}

ssize_t copy_file_range(int in, off64_t *in_offset, int out, off64_t *out_offset, size_t count, unsigned flags)
{
    char path[PATH_MAX];
    int tracked = descriptor_path(out, path);
    lock();
    off_t at = out_offset ? *out_offset : lseek(out, 0, SEEK_CUR);
    ssize_t result = syscall(SYS_copy_file_range, in, in_offset, out, out_offset, count, flags);
    if (result > 0 && tracked)
        put_copied(out, at, result);
    unlock();
    return result;
}
ssize_t sendfile(int out, int in, off_t *offset, size_t count)
{
    char path[PATH_MAX];
    if (!descriptor_path(out, path))
        return syscall(SYS_sendfile, out, in, offset, count);
    lock();
    off_t at = lseek(out, 0, SEEK_CUR);
    ssize_t result = syscall(SYS_sendfile, out, in, offset, count);
    if (result > 0)
        put_copied(out, at, result);
    unlock();
    return result;
}
ssize_t sendfile64(int out, int in, off64_t *offset, size_t count) { return sendfile(out, in, offset, count); }

int ftruncate(int fd, off_t size)
{
    char path[PATH_MAX];
    int tracked = descriptor_path(fd, path);
    lock();
    int result = syscall(SYS_ftruncate, fd, size);
    if (result == 0 && tracked)
        put(TRUNCATE, NULL, NULL, inode_of(fd), size, NULL, 0, 0);
    unlock();
    return result;
}
int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }
int truncate(const char *path, off_t size)
{
    int fd = do_open(AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    int result = ftruncate(fd, size), saved = errno;
    syscall(SYS_close, fd);
    errno = saved;
    return result;
}
int truncate64(const char *path, off64_t size) { return truncate(path, size); }

static int do_fallocate(int fd, int mode, off_t offset, off_t count)
{
    char path[PATH_MAX];
    int tracked = descriptor_path(fd, path);
    lock();
    int result = syscall(SYS_fallocate, fd, mode, offset, count);
    if (result == 0 && tracked) {
        if (mode & (FALLOC_FL_COLLAPSE_RANGE | FALLOC_FL_INSERT_RANGE | FALLOC_FL_UNSHARE_RANGE))
            abort();
        if (mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE))
            put(ZERO, NULL, NULL, inode_of(fd), offset, NULL, 0, count);
        if (!(mode & FALLOC_FL_KEEP_SIZE))
            put(ALLOCATE, NULL, NULL, inode_of(fd), offset, NULL, 0, count);
    }
    unlock();
    return result;
}
int fallocate(int fd, int mode, off_t offset, off_t count) { return do_fallocate(fd, mode, offset, count); }
int fallocate64(int fd, int mode, off64_t offset, off64_t count) { return do_fallocate(fd, mode, offset, count); }
int posix_fallocate(int fd, off_t offset, off_t count) { return do_fallocate(fd, 0, offset, count) ? errno : 0; }
int posix_fallocate64(int fd, off64_t offset, off64_t count) { return posix_fallocate(fd, offset, count); }

/* ---- durability ---- */

static int do_sync(int number, int fd)
{
    char path[PATH_MAX];
    struct stat info;
    int tracked = descriptor_path(fd, path);
    lock();
    int result = syscall(number, fd);
    if (result == 0 && tracked)
        put(SYNC, fstat(fd, &info) == 0 && S_ISDIR(info.st_mode) ? path : NULL, NULL, inode_of(fd), 0, NULL, 0, 0);
    unlock();
    return result;
}
int fsync(int fd) { return do_sync(SYS_fsync, fd); }
int fdatasync(int fd) { return do_sync(SYS_fdatasync, fd); }
int syncfs(int fd)
{
    int result = syscall(SYS_syncfs, fd);
    lock();
    if (result == 0 && log_fd >= 0)
        put(SYNC_ALL, NULL, NULL, 0, 0, NULL, 0, 0);
    unlock();
    return result;
}

/* ---- the end ---- */

/* At once, but between two calls of other threads and not between a call and its record. */
void _exit(int status)
{
    lock();
    syscall(SYS_exit_group, status);
    __builtin_unreachable();
}
