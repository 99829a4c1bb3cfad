/* The filter over a plugin that does nothing but look: whatever reaches it, no reply is held back any more (F11).
 *
 * Exit status 0, or a message and abort().
 */
#include "filter.c"

#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

#define CHECK(true_, ...) ((true_) ? (void)0 : (fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), abort()))

static int ends[2], reached;

void nbdkit_error(const char *format, ...) { (void)format; }

/* Two requests are there, one is read, and its reply is held because of the other. */
static void hold(void)
{
    char byte;
    CHECK(write(ends[0], "xy", 2) == 2 && fp_wire_read(ends[1], &byte, 1) == 1, "reading");
    CHECK(fp_wire_send(ends[1], "r", 1, 0) == 1 && fp_wire_holds(), "nothing is held");
}

static int look(void)
{
    char byte;
    CHECK(!fp_wire_holds(), "call %d of the plugin finds a reply held", reached);
    CHECK(recv(ends[0], &byte, 1, MSG_DONTWAIT) == 1 && byte == 'r', "call %d finds no reply sent", reached);
    CHECK(fp_wire_read(ends[1], &byte, 1) == 1 && byte == 'y', "call %d finds no request", reached);
    reached++;
    return 0;
}

static int see_pread(nbdkit_next *next, void *buf, uint32_t count, uint64_t offset, uint32_t flags, int *err)
{
    (void)next, (void)buf, (void)count, (void)offset, (void)flags, (void)err;
    return look();
}

static int see_pwrite(nbdkit_next *next, const void *buf, uint32_t count, uint64_t offset, uint32_t flags, int *err)
{
    (void)next, (void)buf, (void)count, (void)offset, (void)flags, (void)err;
    return look();
}

static int see_range(nbdkit_next *next, uint32_t count, uint64_t offset, uint32_t flags, int *err)
{
    (void)next, (void)count, (void)offset, (void)flags, (void)err;
    return look();
}

static int see_flush(nbdkit_next *next, uint32_t flags, int *err)
{
    (void)next, (void)flags, (void)err;
    return look();
}

static int see_extents(nbdkit_next *next, uint32_t count, uint64_t offset, uint32_t flags,
                       struct nbdkit_extents *extents, int *err)
{
    (void)next, (void)count, (void)offset, (void)flags, (void)extents, (void)err;
    return look();
}

int main(void)
{
    struct nbdkit_next_ops next = {.pread = see_pread, .pwrite = see_pwrite, .trim = see_range, .zero = see_range,
                                   .cache = see_range, .flush = see_flush, .extents = see_extents};
    struct handle none = {.disk = NULL};
    char buf[1];
    int err, calls = 0;
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0, "socketpair");
    CHECK(fp_wire_send(ends[1], "r", 1, MSG_MORE) == 1 && fp_wire_send(ends[1], "", 0, 0) == 0, "the first send");
    CHECK(recv(ends[0], buf, 1, 0) == 1, "the first reply");
    for (int which = 0; which < 7; which++, calls++) {
        hold();
        switch (which) {
        case 0: filter.pread(&next, &none, buf, 1, 0, 0, &err); break;
        case 1: filter.pwrite(&next, &none, buf, 1, 0, 0, &err); break;
        case 2: filter.trim(&next, &none, 1, 0, 0, &err); break;
        case 3: filter.zero(&next, &none, 1, 0, 0, &err); break;
        case 4: filter.cache(&next, &none, 1, 0, 0, &err); break;
        case 5: filter.flush(&next, &none, 0, &err); break;
        case 6: filter.extents(&next, &none, 1, 0, 0, NULL, &err); break;
        }
    }
    CHECK(reached == calls, "%d of %d calls reached the plugin", reached, calls);
    return 0;
}
