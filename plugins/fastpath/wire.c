/* Clients' sockets with fewer system calls.
 *
 * nbdkit asks the kernel for every request's header and every payload by itself, and sends every part of a reply (of a
 * structured one three) by itself.  It marks the parts with MSG_MORE, which a unix socket ignores: the client is woken
 * for each, and finds half a header.  At queue depth 32 these calls are most of what a request of 4 KiB costs either
 * side.  So where this object is loaded ahead of libc (interpose.c), on a stream socket on which something was sent
 * with MSG_MORE:
 *
 *     gather   parts wait for the last one, and go out with it in one call
 *     ahead    a read takes more than was asked for, if it is there; the next ones are served from that
 *     hold     a reply waits while requests are there that were read ahead, and goes out with theirs
 *
 * A peer sees the same bytes in the same order, cut differently, which no peer of a stream may notice.
 *
 * Rules (blkckpt/disk/__init__.py states all):
 *
 *     F10  What was read ahead is read by the next reads of that socket, in order, and dies with it: when it is closed
 *          here, not in a child.
 *     F11  Held bytes leave before whatever may wait for anything but a processor: a read that goes to the kernel, a
 *         request that goes to the plugin, a read of data that is not in the page cache, a large transfer, a hole;
 *         and before the socket is shut down or closed.
 *     F12  Nothing is held for longer than HOLD_NS of serving others, nor more than fits.
 *     F13  A reply is held only while one thread alone reads the socket, for F11 is about that thread.
 *     F14  A failure to send is told by the send that meets it or by the next one; a read does not fail for it.
 *
 * nbdkit reads a socket in one thread at a time, and sends likewise; a lock of ours keeps those two apart.  A socket's
 * struct is kept for the next socket of that number, so nobody's pointer to it dangles.
 */
#define _GNU_SOURCE
#include "wire.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum {
    DESCRIPTORS = 4096, /* those above are left alone */
    AHEAD = 64 << 10,   /* fifteen writes of 4 KiB: half of what a unix socket holds */
    HELD = 64 << 10,
};

static const int64_t HOLD_NS = 100000; /* ten requests of 4 KiB */

struct wire {
    _Atomic bool marked;
    pid_t owner;
    /* Requests. */
    _Atomic(const void *) reader; /* the thread that reads it */
    _Atomic bool shared;          /* another one has */
    size_t at;
    _Atomic size_t ahead; /* bytes from *at* on */
    bool large;           /* the last read was: the next request may have a large payload too */
    /* Replies. */
    pthread_mutex_t lock;
    int failed; /* the errno of a send that a read made */
    int64_t since;
    _Atomic size_t held;
    char in[AHEAD], out[HELD];
};

static _Atomic(struct wire *) wires[DESCRIPTORS];
static _Atomic uint64_t reads, raw_reads, sends, raw_sends;

static _Thread_local int current = -1; /* the socket that this thread read last */

static void tally(_Atomic uint64_t *counter) { atomic_fetch_add_explicit(counter, 1, memory_order_relaxed); }

void fp_wire_counters(uint64_t out[4])
{
    _Atomic uint64_t *const all[4] = {&reads, &raw_reads, &sends, &raw_sends};
    for (int i = 0; i < 4; i++)
        out[i] = atomic_load_explicit(all[i], memory_order_relaxed);
}

static struct wire *find(int fd)
{
    if (fd < 0 || fd >= DESCRIPTORS)
        return NULL;
    struct wire *wire = atomic_load_explicit(&wires[fd], memory_order_acquire);
    return wire && atomic_load_explicit(&wire->marked, memory_order_acquire) ? wire : NULL;
}

/* From now on *fd* is a client's, if it can be. */
static struct wire *mark(int fd)
{
    int kind = 0;
    if (fd < 0 || fd >= DESCRIPTORS || getsockopt(fd, SOL_SOCKET, SO_TYPE, &kind, &(socklen_t){sizeof kind}) != 0 ||
        kind != SOCK_STREAM)
        return NULL;
    struct wire *wire = atomic_load(&wires[fd]);
    if (!wire) {
        if (!(wire = calloc(1, sizeof *wire)))
            return NULL;
        pthread_mutex_init(&wire->lock, NULL);
        atomic_store(&wires[fd], wire);
    }
    wire->owner = getpid();
    wire->failed = 0;
    wire->at = 0;
    wire->large = false;
    atomic_store(&wire->ahead, 0);
    atomic_store(&wire->held, 0);
    atomic_store(&wire->reader, NULL);
    atomic_store(&wire->shared, false);
    atomic_store_explicit(&wire->marked, true, memory_order_release);
    return wire;
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* ---- replies ---- */

/* What is held, and *buf* after it, all of it; false with errno: what is left of it is dropped, for the stream is
 * broken.  Locked. */
static bool push(struct wire *wire, int fd, const char *buf, size_t length, int flags)
{
    size_t held = atomic_load_explicit(&wire->held, memory_order_relaxed);
    const char *out = wire->out;
    atomic_store_explicit(&wire->held, 0, memory_order_relaxed);
    while (held + length) {
        struct iovec parts[2] = {{(char *)out, held}, {(char *)buf, length}};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
        tally(&raw_sends);
        const ssize_t sent = sendmsg(fd, &message, flags | MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0)
            return false;
        const size_t of_held = (size_t)sent < held ? (size_t)sent : held, of_buf = (size_t)sent - of_held;
        out += of_held;
        held -= of_held;
        buf += of_buf;
        length -= of_buf;
    }
    return true;
}

static void append(struct wire *wire, const void *buf, size_t length)
{
    const size_t held = atomic_load_explicit(&wire->held, memory_order_relaxed);
    if (!held)
        wire->since = now_ns();
    memcpy(wire->out + held, buf, length);
    atomic_store_explicit(&wire->held, held + length, memory_order_relaxed);
}

/* Whether the end of a reply may wait for the next one: requests were read ahead (F11: else the next read waits for
 * the client), by the one thread there is (F13), and the oldest has not waited for long (F12). */
static bool may_wait(struct wire *wire)
{
    return !atomic_load(&wire->shared) && atomic_load(&wire->ahead) != 0 && now_ns() - wire->since < HOLD_NS;
}

ssize_t fp_wire_send(int fd, const void *buf, size_t length, int flags)
{
    const bool more = flags & MSG_MORE;
    struct wire *wire = find(fd);
    if (!wire && !(more && (wire = mark(fd))))
        return sendto(fd, buf, length, flags, NULL, 0);
    tally(&sends);
    ssize_t result = (ssize_t)length;
    pthread_mutex_lock(&wire->lock);
    const size_t held = atomic_load_explicit(&wire->held, memory_order_relaxed);
    const bool fits = length <= FP_WIRE_BRIEF && length <= HELD - held && !(flags & ~(MSG_MORE | MSG_NOSIGNAL));
    if (wire->failed) {
        errno = wire->failed;
        result = -1;
    } else if (fits && (more || may_wait(wire)))
        append(wire, buf, length);
    else if (!push(wire, fd, buf, length, flags & ~MSG_MORE))
        result = -1;
    pthread_mutex_unlock(&wire->lock);
    return result;
}

static void drain(struct wire *wire, int fd)
{
    const int before = errno;
    pthread_mutex_lock(&wire->lock);
    if (!push(wire, fd, NULL, 0, 0))
        wire->failed = errno;
    pthread_mutex_unlock(&wire->lock);
    errno = before;
}

static void release(struct wire *wire, int fd)
{
    if (atomic_load_explicit(&wire->held, memory_order_relaxed) != 0)
        drain(wire, fd);
}

bool fp_wire_holds(void)
{
    struct wire *wire = find(current);
    return wire && atomic_load_explicit(&wire->held, memory_order_relaxed) != 0;
}

void fp_wire_release(void)
{
    struct wire *wire = find(current);
    if (wire)
        release(wire, current);
}

/* ---- requests ---- */

static void read_by_this_thread(struct wire *wire, int fd)
{
    current = fd;
    const void *reader = NULL;
    if (atomic_load_explicit(&wire->reader, memory_order_relaxed) == &current ||
        atomic_compare_exchange_strong(&wire->reader, &reader, &current))
        return;
    if (!atomic_exchange(&wire->shared, true))
        drain(wire, fd); /* who sends now has held its reply before us, or sees that it must not (F13) */
}

ssize_t fp_wire_read(int fd, void *buf, size_t length)
{
    struct wire *wire = find(fd);
    if (!wire)
        return syscall(SYS_read, fd, buf, length);
    read_by_this_thread(wire, fd);
    tally(&reads);
    size_t ahead = atomic_load_explicit(&wire->ahead, memory_order_relaxed);
    if (ahead) {
        const size_t taken = length < ahead ? length : ahead;
        memcpy(buf, wire->in + wire->at, taken);
        wire->at += taken;
        atomic_store(&wire->ahead, ahead - taken);
        return (ssize_t)taken;
    }
    release(wire, fd);
    tally(&raw_reads);
    const size_t room = wire->large ? 0 : AHEAD; /* part of a large payload would be copied twice */
    wire->large = length > FP_WIRE_BRIEF;
    const ssize_t got = readv(fd, (struct iovec[2]){{buf, length}, {wire->in, room}}, 2);
    if (got <= 0 || (size_t)got <= length)
        return got;
    wire->at = 0;
    atomic_store(&wire->ahead, (size_t)got - length);
    return (ssize_t)length;
}

/* ---- ends ---- */

/* A child between vfork() and exec() closes what it has inherited, and has our memory: nothing of that is its. */
static struct wire *own(int fd)
{
    struct wire *wire = find(fd);
    return wire && wire->owner == getpid() ? wire : NULL;
}

int fp_wire_shutdown(int fd, int how)
{
    struct wire *wire = own(fd);
    if (wire)
        release(wire, fd);
    return (int)syscall(SYS_shutdown, fd, how);
}

int fp_wire_close(int fd)
{
    struct wire *wire = own(fd);
    if (wire) {
        release(wire, fd);
        atomic_store(&wire->marked, false);
    }
    return (int)syscall(SYS_close, fd);
}
