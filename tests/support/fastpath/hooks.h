/* Forced into core.c (-include) by tests: its system calls go through the test. */
#ifndef FASTPATH_HOOKS_H
#define FASTPATH_HOOKS_H
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

ssize_t hooked_pread(int fd, void *buf, size_t count, off_t offset);
ssize_t hooked_preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags);
ssize_t hooked_pwrite(int fd, const void *buf, size_t count, off_t offset);
int hooked_fallocate(int fd, int mode, off_t offset, off_t length);

#ifdef FASTPATH_CORE
#define pread hooked_pread
#define preadv2 hooked_preadv2
#define pwrite hooked_pwrite
#define fallocate hooked_fallocate
#endif
#endif
