/*
 * The test guest's only program.  It knows, in its own memory, what every sector of its disks and every page of a
 * region of its RAM must hold, keeps changing both, and says on the serial line when a byte is wrong.  A checkpoint
 * whose disks and memory are not of one instant therefore shows itself after restore, from inside.
 *
 * Options come from the kernel command line (blk.NAME=VALUE):
 *
 *   mode=writer    random writes and read-backs on /dev/vda        mode=ordered  two disks, see below
 *   mode=idle      heartbeats only                                 mode=fill     as idle, after filling RAM
 *   mode=peer      messages to another guest on /dev/ttyS1, see below
 *   span=MIB       how much of the disk is used (default 64)       threads=N     writers, i.e. requests in flight (4)
 *   rate=N         operations a second, 0 = as fast as possible (400)
 *   fsync=N        every N-th write is followed by fdatasync, 0 = never (64)
 *   small=PERCENT  writes not aligned to 4 KiB, of 512 B or more (30)
 *   zero=PERCENT   writes that are BLKZEROOUT (2)                  discard=PERCENT  BLKDISCARD (0)
 *   fill=MIB       RAM filled with random data before "ready" (4)  dirty=N       of its pages rewritten a second (50)
 *   beat=MS        between heartbeats (100)
 *   verify=0       writer: no read-backs (pure write load)
 *
 * Lines printed (one write each):
 *
 *   guest ready mode=M token=T                  once; T is random, made at boot and kept only in RAM
 *   ok seq=N token=T writes=N reads=N ram=N mismatches=N errors=N up=MS        the heartbeat; seq counts heartbeats
 *   MISMATCH disk …  /  MISMATCH ram …          a wrong byte (the first 16 are printed, all are counted)
 *   IOERROR …                                   a request failed; its sectors are unknown until written again
 *   swept id=I sectors=N pages=N mismatches=N   answer to "sweep I": everything was read and compared
 *
 *   peer received=N acknowledged=N              mode=peer, with each heartbeat
 *
 *   file PATH TEXT                              answer to "read PATH": its first line
 *
 * Lines understood: "sweep I", "rate N", "dirty N", "pause", "go", "quit" (power off), "read PATH", "put PATH TEXT".
 *
 * Sector contents (512 bytes, little endian u64 words): 0 magic, 1 sector number, 2 sequence, 3 token, 4..62 a
 * splitmix64 stream seeded by words 1 to 3, 63 the sum of words 0 to 62.  Sequence 0 stands for a sector of zeros.
 * Stripes of 64 KiB belong to one thread each, so a thread alone knows and checks its own sectors.
 *
 * mode=ordered: record n is a 4 KiB block of such sectors (sequence n) in slot n % SLOTS of a ring.  Stream 0 lives in
 * the first half of the span: record n is complete on /dev/vda before it is sent to /dev/vdb.  Stream 1, in the second
 * half, goes the other way round.  So in any one instant, and in any checkpoint, the newest record of stream 0 on vdb
 * is not newer than on vda, and the newest of stream 1 on vda not newer than on vdb.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define SECTOR 512u
#define WORDS (SECTOR / 8)
#define STRIPE_SECTORS 128u /* 64 KiB */
#define PAGE 4096u
#define MAGIC 0x31525754504b4342ull /* "BCKPTWR1" */
#define MAX_THREADS 16
#define PRINTED_MISMATCHES 16
#define UNKNOWN UINT32_MAX

static uint64_t token;
static _Atomic uint64_t writes, reads, ram_pages, mismatches, errors;
static _Atomic uint64_t rate, dirty_rate, sweep_wanted, paused;
static _Atomic uint64_t swept_sectors, swept_pages, sweep_left;
static pthread_mutex_t print_lock = PTHREAD_MUTEX_INITIALIZER;
static char command_line[4096];

struct worker {
    int number, count, disk;
    uint64_t random, sequence, sectors, swept;
    uint32_t *known; /* sequence last written, of every sector of the span; only own stripes are used */
    unsigned char *buffer, *expected;
};

static uint64_t fsync_every, small_percent, zero_percent, discard_percent, verify;

/* ---- small things ---- */

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    if (length > (int)sizeof line - 2)
        length = sizeof line - 2;
    line[length++] = '\n';
    pthread_mutex_lock(&print_lock);
    for (int done = 0; done < length;) {
        ssize_t n = write(1, line + done, length - done);
        if (n <= 0)
            break;
        done += n;
    }
    pthread_mutex_unlock(&print_lock);
}

static uint64_t option(const char *name, uint64_t fallback)
{
    char key[32];
    snprintf(key, sizeof key, " blk.%s=", name);
    const char *found = strstr(command_line, key);
    return found ? strtoull(found + strlen(key), NULL, 0) : fallback;
}

static uint64_t splitmix(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static uint64_t milliseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void nap(uint64_t microseconds)
{
    struct timespec time = {microseconds / 1000000, (microseconds % 1000000) * 1000};
    nanosleep(&time, NULL);
}

static void *aligned(size_t size)
{
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED) {
        say("FATAL no memory for %zu bytes", size);
        for (;;)
            pause();
    }
    return memory;
}

static int open_disk(const char *path)
{
    for (int tries = 0; tries < 200; tries++) {
        int descriptor = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
        if (descriptor >= 0)
            return descriptor;
        nap(50000);
    }
    say("FATAL cannot open %s: %s", path, strerror(errno));
    for (;;)
        pause();
}

/* ---- sectors ---- */

static void make_sector(unsigned char *out, uint64_t sector, uint64_t sequence)
{
    uint64_t words[WORDS];
    if (sequence == 0) {
        memset(out, 0, SECTOR);
        return;
    }
    uint64_t state = sector * 0x2545f4914f6cdd1dull ^ sequence << 32 ^ sequence ^ token;
    words[0] = MAGIC, words[1] = sector, words[2] = sequence, words[3] = token;
    for (unsigned i = 4; i < WORDS - 1; i++)
        words[i] = splitmix(&state);
    words[WORDS - 1] = 0;
    for (unsigned i = 0; i < WORDS - 1; i++)
        words[WORDS - 1] += words[i];
    memcpy(out, words, SECTOR);
}

static void mismatch(struct worker *w, uint64_t sector, uint32_t wanted, const unsigned char *found)
{
    uint64_t words[WORDS], sum = 0;
    memcpy(words, found, SECTOR);
    for (unsigned i = 0; i < WORDS - 1; i++)
        sum += words[i];
    const char *kind = "torn";
    if (words[0] == 0 && sum == 0 && words[WORDS - 1] == 0)
        kind = "zeros";
    else if (words[0] == MAGIC && words[WORDS - 1] == sum)
        kind = words[1] != sector ? "misplaced" : words[3] != token ? "foreign" : words[2] < wanted ? "stale" : "future";
    if (atomic_fetch_add(&mismatches, 1) < PRINTED_MISMATCHES)
        say("MISMATCH disk sector=%llu thread=%d kind=%s wanted=%u found=%llu found_sector=%llu",
            (unsigned long long)sector, w->number, kind, wanted, (unsigned long long)words[2],
            (unsigned long long)words[1]);
}

static void failed(struct worker *w, const char *what, uint64_t sector, uint64_t count, int changed)
{
    if (atomic_fetch_add(&errors, 1) < PRINTED_MISMATCHES)
        say("IOERROR %s sector=%llu count=%llu: %s", what, (unsigned long long)sector, (unsigned long long)count,
            strerror(errno));
    for (uint64_t i = 0; changed && i < count; i++)
        w->known[sector + i] = UNKNOWN;
    nap(10000);
}

static void check(struct worker *w, uint64_t sector, uint64_t count)
{
    ssize_t got = pread(w->disk, w->buffer, count * SECTOR, sector * SECTOR);
    if (got != (ssize_t)(count * SECTOR)) {
        failed(w, "read", sector, count, 0);
        return;
    }
    for (uint64_t i = 0; i < count; i++) {
        uint32_t wanted = w->known[sector + i];
        if (wanted == UNKNOWN)
            continue;
        make_sector(w->expected, sector + i, wanted);
        if (memcmp(w->expected, w->buffer + i * SECTOR, SECTOR))
            mismatch(w, sector + i, wanted, w->buffer + i * SECTOR);
    }
    atomic_fetch_add(&reads, 1);
}

static void change(struct worker *w, uint64_t sector, uint64_t count)
{
    uint64_t kind = splitmix(&w->random) % 100, range[2] = {sector * SECTOR, count * SECTOR};
    uint32_t sequence = ++w->sequence;
    if (kind < zero_percent + discard_percent) {
        int discard = kind >= zero_percent;
        if (ioctl(w->disk, discard ? BLKDISCARD : BLKZEROOUT, range) < 0) {
            failed(w, discard ? "discard" : "zero", sector, count, 1);
            return;
        }
        for (uint64_t i = 0; i < count; i++) /* what is read after a discard is anybody's guess */
            w->known[sector + i] = discard ? UNKNOWN : 0;
    } else {
        for (uint64_t i = 0; i < count; i++)
            make_sector(w->buffer + i * SECTOR, sector + i, sequence);
        if (pwrite(w->disk, w->buffer, count * SECTOR, sector * SECTOR) != (ssize_t)(count * SECTOR)) {
            failed(w, "write", sector, count, 1);
            return;
        }
        for (uint64_t i = 0; i < count; i++)
            w->known[sector + i] = sequence;
    }
    atomic_fetch_add(&writes, 1);
    if (fsync_every && sequence % fsync_every == 0 && fdatasync(w->disk) < 0)
        failed(w, "fsync", sector, 0, 0);
}

/* A place in one of the worker's own stripes; half of all go to the first sixteenth of the disk, to meet again. */
static void pick(struct worker *w, uint64_t *sector, uint64_t *count)
{
    uint64_t r = splitmix(&w->random), stripes = w->sectors / STRIPE_SECTORS / w->count;
    uint64_t reach = (r & 1) && stripes > 16 ? stripes / 16 : stripes;
    uint64_t stripe = (r >> 8) % reach * w->count + w->number;
    uint64_t offset = (r >> 40) % STRIPE_SECTORS, length;
    if ((r >> 1) % 100 < small_percent) {
        length = 1 + (r >> 50) % ((r & 2) ? 7 : 32);
    } else {
        offset &= ~7ull;
        length = 8 * (1 + ((r & 0xc) ? 0 : (r >> 50) % 8));
    }
    *sector = stripe * STRIPE_SECTORS + offset;
    *count = offset + length > STRIPE_SECTORS ? STRIPE_SECTORS - offset : length;
}

static void maybe_sweep(struct worker *w)
{
    uint64_t wanted = atomic_load(&sweep_wanted);
    if (wanted == w->swept)
        return;
    w->swept = wanted;
    for (uint64_t stripe = w->number; stripe < w->sectors / STRIPE_SECTORS; stripe += w->count) {
        check(w, stripe * STRIPE_SECTORS, STRIPE_SECTORS);
        atomic_fetch_add(&swept_sectors, STRIPE_SECTORS);
    }
    atomic_fetch_sub(&sweep_left, 1);
}

static void *write_and_check(void *argument)
{
    struct worker *w = argument;
    for (;;) {
        uint64_t sector, count, speed = atomic_load(&rate);
        maybe_sweep(w);
        if (atomic_load(&paused)) {
            nap(5000);
            continue;
        }
        pick(w, &sector, &count);
        if (verify && splitmix(&w->random) % 10 < 4)
            check(w, sector, count);
        else
            change(w, sector, count);
        if (speed)
            nap(splitmix(&w->random) % (2000000 * w->count / speed + 1));
    }
    return NULL;
}

static int start_writers(uint64_t sectors)
{
    int count = option("threads", 4);
    if (count < 1 || count > MAX_THREADS)
        count = 4;
    uint32_t *known = aligned(sectors * sizeof *known);
    for (int i = 0; i < count; i++) {
        struct worker *w = aligned(PAGE);
        *w = (struct worker){.number = i, .count = count, .sectors = sectors, .known = known};
        w->disk = open_disk("/dev/vda");
        w->random = token + i;
        w->buffer = aligned(STRIPE_SECTORS * SECTOR);
        w->expected = aligned(PAGE);
        pthread_t thread;
        pthread_create(&thread, NULL, write_and_check, w);
    }
    return count;
}

/* A disk that already holds data (a restart, not a restore) is not what the table of zeros says: clear it. */
static void clear_disk(const char *path, uint64_t sectors)
{
    int disk = open_disk(path);
    uint64_t range[2] = {0, sectors * SECTOR};
    if (ioctl(disk, BLKZEROOUT, range) < 0)
        say("IOERROR clear: %s", strerror(errno));
    close(disk);
}

static uint64_t span_of(const char *path)
{
    uint64_t bytes = 0, wanted = option("span", 64) << 20;
    int disk = open_disk(path);
    ioctl(disk, BLKGETSIZE64, &bytes);
    close(disk);
    return (bytes < wanted ? bytes : wanted) / SECTOR / STRIPE_SECTORS * STRIPE_SECTORS;
}

/* ---- memory ---- */

static uint64_t *ram;
static uint32_t *ram_generation;
static uint64_t ram_count;

static void make_page(uint64_t *out, uint64_t page, uint32_t generation)
{
    uint64_t state = page * 0x2545f4914f6cdd1dull ^ (uint64_t)generation << 40 ^ token;
    out[0] = page, out[1] = generation;
    for (unsigned i = 2; i < PAGE / 8; i++)
        out[i] = splitmix(&state);
}

static void check_ram(void)
{
    static uint64_t expected[PAGE / 8];
    for (uint64_t page = 0; page < ram_count; page++) {
        uint64_t *found = ram + page * (PAGE / 8);
        make_page(expected, page, ram_generation[page]);
        if (memcmp(expected, found, PAGE) && atomic_fetch_add(&mismatches, 1) < PRINTED_MISMATCHES)
            say("MISMATCH ram page=%llu wanted=%u found_page=%llu found=%llu", (unsigned long long)page,
                ram_generation[page], (unsigned long long)found[0], (unsigned long long)found[1]);
    }
    atomic_store(&swept_pages, ram_count);
    atomic_fetch_sub(&sweep_left, 1);
}

static void *dirty_ram(void *unused)
{
    uint64_t random = token ^ 0x5eed, swept = 0;
    (void)unused;
    for (;;) {
        uint64_t speed = atomic_load(&dirty_rate), wanted = atomic_load(&sweep_wanted);
        if (wanted != swept) {
            swept = wanted;
            check_ram();
        }
        if (!speed || !ram_count || atomic_load(&paused)) {
            nap(5000);
            continue;
        }
        for (uint64_t i = 0; i < 1 + speed / 100; i++) {
            uint64_t page = splitmix(&random) % ram_count;
            make_page(ram + page * (PAGE / 8), page, ++ram_generation[page]);
            atomic_fetch_add(&ram_pages, 1);
        }
        nap(1000000 / (speed < 100 ? speed : 100));
    }
    return NULL;
}

static void start_ram(void)
{
    pthread_t thread;
    ram_count = (option("fill", 4) << 20) / PAGE;
    if (ram_count) {
        ram = aligned(ram_count * PAGE);
        ram_generation = aligned((ram_count * sizeof *ram_generation + PAGE) & ~(PAGE - 1ull));
    }
    for (uint64_t page = 0; page < ram_count; page++)
        make_page(ram + page * (PAGE / 8), page, 0);
    pthread_create(&thread, NULL, dirty_ram, NULL);
}

/* ---- two disks ---- */

struct stream {
    uint64_t base, slots;
    int first, second;
};

static void put_record(struct stream *s, int disk, unsigned char *buffer, uint64_t n)
{
    uint64_t sector = s->base + n % s->slots * 8;
    for (unsigned i = 0; i < 8; i++)
        make_sector(buffer + i * SECTOR, sector + i, n);
    while (pwrite(disk, buffer, PAGE, sector * SECTOR) != PAGE) {
        say("IOERROR record=%llu: %s", (unsigned long long)n, strerror(errno));
        atomic_fetch_add(&errors, 1);
        nap(10000);
    }
}

static void *write_ordered(void *argument)
{
    struct stream *s = argument;
    unsigned char *buffer = aligned(PAGE);
    for (uint64_t n = 1;; n++) {
        uint64_t speed = atomic_load(&rate);
        while (atomic_load(&paused))
            nap(5000);
        put_record(s, s->first, buffer, n);
        put_record(s, s->second, buffer, n);
        atomic_fetch_add(&writes, 1);
        if (speed)
            nap(1000000 / speed);
    }
    return NULL;
}

static void start_ordered(uint64_t sectors)
{
    for (int i = 0; i < 2; i++) {
        struct stream *s = aligned(PAGE);
        s->base = i * (sectors / 2);
        s->slots = sectors / 2 / 8;
        s->first = open_disk(i ? "/dev/vdb" : "/dev/vda");
        s->second = open_disk(i ? "/dev/vda" : "/dev/vdb");
        pthread_t thread;
        pthread_create(&thread, NULL, write_ordered, s);
    }
}

/* ---- another guest ---- */

static _Atomic uint64_t received, acknowledged;
static int peer_line;

static void tell_peer(char what, uint64_t n)
{
    char line[32];
    int length = snprintf(line, sizeof line, "%c %llu\n", what, (unsigned long long)n);
    if (write(peer_line, line, length) != length)
        say("IOERROR peer: %s", strerror(errno));
}

static void *listen_to_peer(void *argument)
{
    struct stream *streams = argument;
    unsigned char *buffer = aligned(PAGE);
    FILE *in = fdopen(peer_line, "r");
    char line[64], what;
    unsigned long long n;
    for (;;) {
        if (!fgets(line, sizeof line, in)) {
            clearerr(in);
            nap(10000);
        } else if (sscanf(line, "%c %llu", &what, &n) == 2 && n) {
            struct stream *stream = &streams[what == 'a'];
            put_record(stream, stream->first, buffer, n);
            atomic_store(what == 'a' ? &acknowledged : &received, n);
            if (what == 'a')
                nap(1000);
            tell_peer(what == 'a' ? 'm' : 'a', what == 'a' ? n + 1 : n);
        }
    }
    return NULL;
}

/* "m 1" goes out at the word "go": the other may not be there before. */
static void start_peer(uint64_t sectors)
{
    struct stream *streams = aligned(PAGE);
    struct termios settings;
    peer_line = open("/dev/ttyS1", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (peer_line < 0 || tcgetattr(peer_line, &settings) < 0) {
        say("FATAL cannot open /dev/ttyS1: %s", strerror(errno));
        return;
    }
    cfmakeraw(&settings);
    tcsetattr(peer_line, TCSANOW, &settings);
    for (int i = 0; i < 2; i++)
        streams[i] = (struct stream){i * (sectors / 2), sectors / 2 / 8, open_disk("/dev/vda"), -1};
    pthread_t thread;
    pthread_create(&thread, NULL, listen_to_peer, streams);
}

/* ---- serial line ---- */

static void *beat(void *unused)
{
    uint64_t interval = option("beat", 100), seq = 0, reported = 0;
    (void)unused;
    for (;;) {
        nap(interval * 1000);
        uint64_t wanted = atomic_load(&sweep_wanted);
        if (wanted != reported && atomic_load(&sweep_left) == 0) {
            reported = wanted;
            say("swept id=%llu sectors=%llu pages=%llu mismatches=%llu", (unsigned long long)wanted,
                (unsigned long long)swept_sectors, (unsigned long long)swept_pages, (unsigned long long)mismatches);
        }
        if (peer_line > 0)
            say("peer received=%llu acknowledged=%llu", (unsigned long long)received, (unsigned long long)acknowledged);
        say("ok seq=%llu token=%016llx writes=%llu reads=%llu ram=%llu mismatches=%llu errors=%llu up=%llu",
            (unsigned long long)++seq, (unsigned long long)token, (unsigned long long)writes,
            (unsigned long long)reads, (unsigned long long)ram_pages, (unsigned long long)mismatches,
            (unsigned long long)errors, (unsigned long long)milliseconds());
    }
    return NULL;
}

/* "read PATH" and "put PATH TEXT", for what the kernel shows and takes in /sys. */
static void file_command(const char *path, const char *text)
{
    char content[128] = "";
    int file = open(path, (text ? O_WRONLY : O_RDONLY) | O_CLOEXEC);
    if (file < 0 || (text ? write(file, text, strlen(text)) : read(file, content, sizeof content - 1)) < 0)
        say("file %s FAILED %s", path, strerror(errno));
    else
        say("file %s %.*s", path, (int)strcspn(text ? "written" : content, "\n"), text ? "written" : content);
    if (file >= 0)
        close(file);
}

static void obey(char *line, int sweepers)
{
    unsigned long long number = 0;
    char path[96], text[32];
    if (sscanf(line, "sweep %llu", &number) == 1) {
        if (atomic_load(&sweep_left))
            return;
        atomic_store(&swept_sectors, 0);
        atomic_store(&sweep_left, sweepers);
        atomic_store(&sweep_wanted, number);
    } else if (sscanf(line, "rate %llu", &number) == 1) {
        atomic_store(&rate, number);
    } else if (sscanf(line, "dirty %llu", &number) == 1) {
        atomic_store(&dirty_rate, number);
    } else if (!strncmp(line, "pause", 5)) {
        atomic_store(&paused, 1);
    } else if (!strncmp(line, "go", 2)) {
        atomic_store(&paused, 0);
        if (peer_line > 0 && !atomic_load(&acknowledged))
            tell_peer('m', 1);
    } else if (sscanf(line, "read %95s", path) == 1) {
        file_command(path, NULL);
    } else if (sscanf(line, "put %95s %31s", path, text) == 2) {
        file_command(path, text);
    } else if (!strncmp(line, "quit", 4)) {
        atomic_store(&paused, 1);
        nap(300000); /* let what is in flight end; the disks go first */
        reboot(RB_POWER_OFF);
    }
}

static void prepare_console(void)
{
    struct termios settings;
    if (tcgetattr(0, &settings) == 0) {
        settings.c_lflag &= ~(ECHO | ISIG);
        settings.c_lflag |= ICANON;
        tcsetattr(0, TCSANOW, &settings);
    }
}

static void read_command_line(void)
{
    FILE *file = fopen("/proc/cmdline", "r");
    command_line[0] = ' ';
    if (!file || !fgets(command_line + 1, sizeof command_line - 1, file))
        say("FATAL no /proc/cmdline");
    if (file)
        fclose(file);
}

int main(void)
{
    char mode[16] = "idle", line[128];
    int sweepers = 1;
    pthread_t thread;
    prepare_console();
    read_command_line();
    const char *given = strstr(command_line, " blk.mode=");
    if (given)
        sscanf(given, " blk.mode=%15[a-z]", mode);
    if (getrandom(&token, sizeof token, GRND_INSECURE) != sizeof token)
        token = milliseconds() * 0x9e3779b97f4a7c15ull;
    rate = option("rate", 400);
    dirty_rate = option("dirty", 50);
    fsync_every = option("fsync", 64), small_percent = option("small", 30), verify = option("verify", 1);
    zero_percent = option("zero", 2), discard_percent = option("discard", 0);
    start_ram();
    if (!strcmp(mode, "writer")) {
        uint64_t sectors = span_of("/dev/vda");
        clear_disk("/dev/vda", sectors);
        sweepers += start_writers(sectors);
    } else if (!strcmp(mode, "ordered")) {
        uint64_t sectors = span_of("/dev/vda");
        clear_disk("/dev/vda", sectors);
        clear_disk("/dev/vdb", sectors);
        start_ordered(sectors);
    } else if (!strcmp(mode, "peer")) {
        uint64_t sectors = span_of("/dev/vda");
        clear_disk("/dev/vda", sectors);
        start_peer(sectors);
    }
    say("guest ready mode=%s token=%016llx", mode, (unsigned long long)token);
    pthread_create(&thread, NULL, beat, NULL);
    for (;;) {
        if (fgets(line, sizeof line, stdin))
            obey(line, sweepers);
        else
            nap(100000);
    }
}
