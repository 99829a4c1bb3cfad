/* Puts wire.c in the place of libc's functions, for a program that loads this object ahead of libc (LD_PRELOAD), as
 * `blkckpt serve` has nbdkit do.  Loaded as a filter alone, nobody finds these names here, and nothing changes.
 *
 * The variable is for this process only: its children, which are other programs, do not inherit this object by it.
 */
#define _GNU_SOURCE
#include "wire.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static const char VARIABLE[] = "LD_PRELOAD";

ssize_t read(int fd, void *buf, size_t length) { return fp_wire_read(fd, buf, length); }

ssize_t recv(int fd, void *buf, size_t length, int flags)
{
    return flags ? recvfrom(fd, buf, length, flags, NULL, NULL) : fp_wire_read(fd, buf, length);
}

ssize_t send(int fd, const void *buf, size_t length, int flags) { return fp_wire_send(fd, buf, length, flags); }

int shutdown(int fd, int how) { return fp_wire_shutdown(fd, how); }

int close(int fd) { return fp_wire_close(fd); }

/* Take this object's own path out of the variable: the last of it, as blkckpt.agent.nbdserver puts it there. */
__attribute__((constructor)) static void loaded(void)
{
    Dl_info self;
    char *value = getenv(VARIABLE);
    if (!value || !dladdr((void *)VARIABLE, &self) || !self.dli_fname)
        return;
    const size_t all = strlen(value), mine = strlen(self.dli_fname);
    if (all < mine || strcmp(value + all - mine, self.dli_fname) != 0)
        return;
    if (all == mine)
        unsetenv(VARIABLE);
    else if (value[all - mine - 1] == ':')
        value[all - mine - 1] = '\0';
}
