/* A child that closes what it has inherited, as those that start programs do. */
#define _GNU_SOURCE
#include <sys/wait.h>
#include <unistd.h>

#include "wire.h"

int close_in_child(int fd)
{
    const pid_t child = vfork();
    if (child == 0)
        _exit(fp_wire_close(fd));
    int status;
    return waitpid(child, &status, 0) == child ? status : -1;
}
