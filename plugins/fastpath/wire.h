/* Clients' sockets with fewer system calls: see wire.c.  What interpose.c puts in the place of libc's functions. */
#ifndef BLKCKPT_FASTPATH_WIRE_H
#define BLKCKPT_FASTPATH_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* As read(2), send(2), shutdown(2), close(2), of any descriptor. */
ssize_t fp_wire_read(int fd, void *buf, size_t length);
ssize_t fp_wire_send(int fd, const void *buf, size_t length, int flags);
int fp_wire_shutdown(int fd, int how);
int fp_wire_close(int fd);

/* Of the connection whose request this thread has read: whether a reply is held back; send what is (F11). */
bool fp_wire_holds(void);
void fp_wire_release(void);

/* Calls for a client's socket so far: reads asked for, reads made, sends asked for, sends made. */
void fp_wire_counters(uint64_t out[4]);

/* Transfers of more are neither copied nor waited for by a reply that is held. */
enum { FP_WIRE_BRIEF = 16 << 10 };

#endif
