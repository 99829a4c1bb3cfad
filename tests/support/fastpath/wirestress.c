/* Clients' sockets under load, for sanitizers: a client that pipelines, and servers that read and answer as nbdkit's do.
 *
 *     wirestress SECONDS SERVERS        exit status 0, or a message and abort()
 *
 * Every connection has a client that sends requests cut at random and at most DEPTH ahead of the replies, and SERVERS
 * threads that take turns at reading and at answering.  What arrives is checked byte by byte.  A reply that nobody
 * sends stops the client, and the alarm ends that.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "wire.h"

enum { DEPTH = 32, LONG = 40000, SLOW = 50, LIMIT = 12 };

#define CHECK(true_, ...) ((true_) ? (void)0 : (fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), abort()))

struct request {
    uint32_t number, length; /* of the payload, and of the reply's; 0: the last one */
};

struct connection {
    int client, server;
    uint32_t requests, seed;
    sem_t room;
    pthread_mutex_t reading, answering;
    bool ended;
};

static uint32_t next_random(uint32_t *seed) { return *seed = *seed * 1664525 + 1013904223; }

static uint8_t byte_of(uint32_t number, uint32_t at) { return (uint8_t)(number * 31 + at * 7); }

static void fill(uint8_t *body, const struct request *request)
{
    for (uint32_t i = 0; i < request->length; i++)
        body[i] = byte_of(request->number, i);
}

static void check(const uint8_t *body, const struct request *request, const char *whose)
{
    for (uint32_t i = 0; i < request->length; i++)
        CHECK(body[i] == byte_of(request->number, i), "%s %u is wrong at byte %u", whose, request->number, i);
}

static void *send_requests(void *argument)
{
    struct connection *one = argument;
    static _Thread_local uint8_t out[sizeof(struct request) + LONG];
    for (uint32_t number = 1; number <= one->requests; number++) {
        const uint32_t random = next_random(&one->seed) >> 8;
        struct request request = {number, 1 + random % (random % 8 ? 4096 : LONG)};
        if (number == one->requests)
            request.length = 0;
        memcpy(out, &request, sizeof request);
        fill(out + sizeof request, &request);
        while (sem_wait(&one->room) != 0)
            ;
        for (size_t at = 0, all = sizeof request + request.length; at < all;) {
            const size_t part = 1 + (next_random(&one->seed) >> 8) % (all - at);
            const ssize_t sent = write(one->client, out + at, part);
            CHECK(sent > 0, "the client cannot send");
            at += (size_t)sent;
        }
    }
    return NULL;
}

static void receive(int fd, void *into, size_t length)
{
    CHECK(recv(fd, into, length, MSG_WAITALL) == (ssize_t)length, "the replies end early");
}

static void *receive_replies(void *argument)
{
    struct connection *one = argument;
    static _Thread_local uint8_t body[LONG];
    uint8_t *seen = calloc(1, one->requests + 1);
    for (uint32_t count = 1; count < one->requests; count++) { /* the last request has no reply */
        struct request reply;
        receive(one->client, &reply, sizeof reply);
        CHECK(reply.number < one->requests && !seen[reply.number] && reply.length <= LONG, "reply %u", reply.number);
        seen[reply.number] = 1;
        receive(one->client, body, reply.length);
        check(body, &reply, "reply");
        sem_post(&one->room);
    }
    free(seen);
    return NULL;
}

static bool take(int fd, void *into, size_t length)
{
    for (size_t at = 0; at < length;) {
        const ssize_t got = fp_wire_read(fd, (char *)into + at, length - at);
        CHECK(got >= 0, "a server cannot read");
        if (got == 0)
            return false;
        at += (size_t)got;
    }
    return true;
}

static void put(int fd, const void *from, size_t length, int flags)
{
    CHECK(fp_wire_send(fd, from, length, flags) == (ssize_t)length, "a server cannot send");
}

static void *serve(void *argument)
{
    struct connection *one = argument;
    static _Thread_local uint8_t body[LONG];
    for (;;) {
        struct request request = {0};
        pthread_mutex_lock(&one->reading);
        const bool got = !one->ended && take(one->server, &request, sizeof request);
        CHECK(request.length <= LONG, "request %u of %u bytes", request.number, request.length);
        if (got && request.length)
            CHECK(take(one->server, body, request.length), "half a request");
        one->ended = one->ended || !got || !request.length;
        const bool last = one->ended;
        pthread_mutex_unlock(&one->reading);
        if (last)
            return NULL;
        check(body, &request, "request");
        if (request.number % SLOW == 0) { /* goes to the plugin, which takes its time */
            fp_wire_release();
            nanosleep(&(struct timespec){.tv_nsec = 300000}, NULL);
        }
        pthread_mutex_lock(&one->answering);
        put(one->server, &request, sizeof request, MSG_MORE);
        put(one->server, body, request.length, 0);
        pthread_mutex_unlock(&one->answering);
    }
}

static void run(uint32_t seed, int servers)
{
    struct connection one = {.requests = 600, .seed = seed};
    int ends[2];
    pthread_t threads[16];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0, "socketpair");
    one.client = ends[0];
    one.server = ends[1];
    sem_init(&one.room, 0, DEPTH);
    pthread_mutex_init(&one.reading, NULL);
    pthread_mutex_init(&one.answering, NULL);
    struct request greeting = {0};
    put(one.server, &greeting.number, sizeof greeting.number, MSG_MORE);
    put(one.server, &greeting.length, sizeof greeting.length, 0);
    receive(one.client, &greeting, sizeof greeting);
    pthread_create(&threads[0], NULL, send_requests, &one);
    pthread_create(&threads[1], NULL, receive_replies, &one);
    for (int i = 0; i < servers; i++)
        pthread_create(&threads[2 + i], NULL, serve, &one);
    for (int i = 0; i < servers; i++)
        pthread_join(threads[2 + i], NULL);
    CHECK(fp_wire_close(one.server) == 0, "close"); /* replies may still be held */
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    close(one.client);
}

int main(int count, char **arguments)
{
    CHECK(count == 3, "usage: wirestress SECONDS SERVERS");
    alarm((unsigned)atoi(arguments[1]) + LIMIT);
    const time_t until = time(NULL) + atoi(arguments[1]);
    uint32_t rounds = 0;
    do
        run(++rounds, atoi(arguments[2]));
    while (time(NULL) < until);
    uint64_t calls[4];
    fp_wire_counters(calls);
    CHECK(calls[1] < calls[0] && calls[3] < calls[2], "nothing was read ahead or gathered");
    return 0;
}
