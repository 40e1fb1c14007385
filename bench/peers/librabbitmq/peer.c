// Tutorial six (RPC) in C with librabbitmq: the server and the client of the benchmark.
//
//   peer server --url URL --queue Q --workers W --prefetch P [--echo 1]
//   peer client --url URL --queue Q --requests N --warmup M --concurrency C --argument n
//                                                                        or --size BYTES
//                                                  [--expiration MS] [--mandatory 1]
//
// What makes it fast:
// - Frames are read with amqp_simple_wait_frame. amqp_consume_message would copy every delivery's
//   properties and body onto the heap first.
// - librabbitmq sets TCP_NODELAY itself, but writes each frame with a send() of its own. TCP_CORK
//   around everything that one batch of deliveries leads to makes that one segment, and so one
//   wake-up of the broker.

#include <amqp.h>
#include <amqp_tcp_socket.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

// A reply that takes longer will not come.
enum { REPLY_TIMEOUT_S = 60 };
// What RabbitMQ offers; a larger frame is cut down to it.
enum { FRAME_MAX_BYTES = 131072 };
enum { CHANNEL = 1 };
// Room for any number or correlation id of ours, in decimal.
enum { NUMBER_MAX_BYTES = 24 };

typedef struct {
    const char *url, *queue, *expiration;
    uint32_t workers, prefetch, requests, warmup, concurrency, argument, echo, size, mandatory;
} options_t;

// What of a delivery the server and the client look at. The bytes are the library's, and valid
// until amqp_maybe_release_buffers; only a body is moved, for it may come in several frames. Its
// room is kept for the next one, and grows. Behind it is a '\0'.
typedef struct {
    uint64_t tag;
    amqp_bytes_t correlation_id, reply_to;
    char *body;
    size_t body_size, room;
} delivery_t;

static void die(const char *what, const char *why) {
    fprintf(stderr, "peer: %s: %s\n", what, why);
    exit(1);
}

static void check(const char *what, int status) {
    if (status != AMQP_STATUS_OK) die(what, amqp_error_string2(status));
}

static void check_reply(const char *what, amqp_rpc_reply_t reply) {
    if (reply.reply_type == AMQP_RESPONSE_NORMAL) return;
    die(what, reply.reply_type == AMQP_RESPONSE_LIBRARY_EXCEPTION
                  ? amqp_error_string2(reply.library_error)
                  : "the broker refused");
}

// The tutorial's recursion, slow on purpose.
static uint64_t fib(uint32_t n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

static amqp_connection_state_t open_connection(const char *url) {
    char *decoded = strdup(url); // amqp_parse_url writes into it
    struct amqp_connection_info to;
    check("--url", amqp_parse_url(decoded, &to));
    amqp_connection_state_t connection = amqp_new_connection();
    check("connect", amqp_socket_open(amqp_tcp_socket_new(connection), to.host, to.port));
    check_reply("login", amqp_login(connection, to.vhost, 0, FRAME_MAX_BYTES, 0,
                                    AMQP_SASL_METHOD_PLAIN, to.user, to.password));
    amqp_channel_open(connection, CHANNEL);
    check_reply("open a channel", amqp_get_rpc_reply(connection));
    free(decoded);
    return connection;
}

// While corked, the kernel sends full segments only; uncorking sends the rest.
static void cork(amqp_connection_state_t connection, int on) {
    setsockopt(amqp_get_sockfd(connection), IPPROTO_TCP, TCP_CORK, &on, sizeof on);
}

static amqp_basic_properties_t properties_of(amqp_bytes_t correlation_id) {
    return (amqp_basic_properties_t){
        ._flags = AMQP_BASIC_CONTENT_TYPE_FLAG | AMQP_BASIC_CORRELATION_ID_FLAG,
        .content_type = amqp_cstring_bytes("text/plain"),
        .correlation_id = correlation_id,
    };
}

static void publish(amqp_connection_state_t connection, amqp_bytes_t routing_key, bool mandatory,
                    const amqp_basic_properties_t *properties, amqp_bytes_t body) {
    check("publish", amqp_basic_publish(connection, CHANNEL, amqp_empty_bytes, routing_key,
                                        mandatory, false, properties, body));
}

static void read_frame(amqp_connection_state_t connection, amqp_frame_t *frame,
                       const struct timeval *timeout) {
    check("read", amqp_simple_wait_frame_noblock(connection, frame, timeout));
}

// Waits for the next delivery; without a timeout for ever.
static void read_delivery(amqp_connection_state_t connection, delivery_t *delivery,
                          const struct timeval *timeout) {
    amqp_frame_t frame;
    read_frame(connection, &frame, timeout);
    if (frame.frame_type != AMQP_FRAME_METHOD || frame.payload.method.id != AMQP_BASIC_DELIVER_METHOD)
        die("read", "not a delivery; the broker has closed the channel or the connection");
    delivery->tag = ((amqp_basic_deliver_t *)frame.payload.method.decoded)->delivery_tag;

    read_frame(connection, &frame, timeout);
    const amqp_basic_properties_t *properties = frame.payload.properties.decoded;
    bool identified = properties->_flags & AMQP_BASIC_CORRELATION_ID_FLAG;
    delivery->correlation_id = identified ? properties->correlation_id : amqp_empty_bytes;
    bool answerable = properties->_flags & AMQP_BASIC_REPLY_TO_FLAG;
    delivery->reply_to = answerable ? properties->reply_to : amqp_empty_bytes;

    size_t size = frame.payload.properties.body_size, got = 0;
    if (size >= delivery->room) {
        free(delivery->body);
        delivery->room = size + NUMBER_MAX_BYTES;
        delivery->body = malloc(delivery->room);
        if (!delivery->body) die("read", "no memory for the body");
    }
    while (got < size) {
        read_frame(connection, &frame, timeout);
        amqp_bytes_t part = frame.payload.body_fragment;
        memcpy(delivery->body + got, part.bytes, part.len);
        got += part.len;
    }
    delivery->body[got] = '\0';
    delivery->body_size = size;
}

// Whether another delivery can be read without waiting (its first bytes at least are here).
static bool more_is_here(amqp_connection_state_t connection) {
    return amqp_data_in_buffer(connection) || amqp_frames_enqueued(connection);
}

// --- Server ------------------------------------------------------------------------------------

static void serve(const options_t *options, int ready) {
    amqp_connection_state_t connection = open_connection(options->url);
    amqp_bytes_t queue = amqp_cstring_bytes(options->queue);
    amqp_queue_declare(connection, CHANNEL, queue, false, false, false, false, amqp_empty_table);
    check_reply("declare the queue", amqp_get_rpc_reply(connection));
    amqp_basic_qos(connection, CHANNEL, 0, options->prefetch, false);
    check_reply("set the prefetch", amqp_get_rpc_reply(connection));
    amqp_basic_consume(connection, CHANNEL, queue, amqp_empty_bytes, false, false, false,
                       amqp_empty_table);
    check_reply("consume", amqp_get_rpc_reply(connection));
    if (write(ready, "", 1) != 1) die("serve", "the parent is gone");

    delivery_t request = {0};
    for (;;) {
        bool corked = false;
        do {
            read_delivery(connection, &request, NULL);
            if (!corked) cork(connection, true);
            corked = true;
            char answer[NUMBER_MAX_BYTES];
            amqp_bytes_t body = {request.body_size, request.body};
            if (!options->echo) {
                uint32_t n = strtoul(request.body, NULL, 10);
                int length = snprintf(answer, sizeof answer, "%" PRIu64, fib(n));
                body = (amqp_bytes_t){length, answer};
            }
            amqp_basic_properties_t properties = properties_of(request.correlation_id);
            publish(connection, request.reply_to, false, &properties, body);
            check("ack", amqp_basic_ack(connection, CHANNEL, request.tag, false));
            amqp_maybe_release_buffers(connection);
        } while (more_is_here(connection));
        cork(connection, false);
    }
}

// A process for each worker: a librabbitmq connection belongs to one thread, and processes share
// no heap.
static int server(const options_t *options) {
    int ready[2];
    if (pipe(ready) != 0) die("server", "no pipe");
    for (uint32_t i = 0; i < options->workers; i++) {
        pid_t child = fork();
        if (child < 0) die("server", "cannot fork");
        if (child == 0) {
            // SIGTERM need only reach the parent: its end is the signal for the workers.
            prctl(PR_SET_PDEATHSIG, SIGTERM);
            close(ready[0]);
            serve(options, ready[1]);
        }
    }
    close(ready[1]); // so that read() ends if a worker dies before it is ready
    for (uint32_t i = 0; i < options->workers; i++) {
        char byte;
        if (read(ready[0], &byte, 1) != 1) return 1;
    }
    puts(" [x] Awaiting RPC requests");
    fflush(stdout);
    wait(NULL); // workers end only by failing
    return 1;
}

// --- Client ------------------------------------------------------------------------------------

typedef struct {
    amqp_connection_state_t connection;
    amqp_bytes_t queue, callback_queue, request, expected;
    const char *expiration;
    bool mandatory;
    uint32_t concurrency;
    uint64_t next_id; // correlation ids are this number in decimal, over all calls
} client_t;

typedef struct {
    uint32_t ok, wrong;
    double seconds;
    double *latencies_s;
} result_t;

// Makes `count` calls, `concurrency` at a time.
static result_t call_many(client_t *client, uint32_t count) {
    const struct timeval timeout = {.tv_sec = REPLY_TIMEOUT_S};
    amqp_connection_state_t connection = client->connection;
    uint64_t first_id = client->next_id;
    double *sent_s = calloc(count + 1, sizeof(double)); // when, by id; 0 if not under way
    result_t result = {.latencies_s = calloc(count + 1, sizeof(double))};
    delivery_t reply = {0};
    uint32_t sent = 0, in_flight = 0;
    double began_s = now_s(), at_s = began_s;

    while (result.ok + result.wrong < count) {
        // Corking costs two system calls, which a single request cannot save.
        bool several = client->concurrency - in_flight > 1;
        if (several) cork(connection, true);
        for (; in_flight < client->concurrency && sent < count; in_flight++, sent++) {
            char id[NUMBER_MAX_BYTES];
            int length = snprintf(id, sizeof id, "%" PRIu64, client->next_id++);
            sent_s[sent] = now_s();
            amqp_basic_properties_t properties = properties_of((amqp_bytes_t){length, id});
            properties._flags |= AMQP_BASIC_REPLY_TO_FLAG;
            properties.reply_to = client->callback_queue;
            if (client->expiration) {
                properties._flags |= AMQP_BASIC_EXPIRATION_FLAG;
                properties.expiration = amqp_cstring_bytes(client->expiration);
            }
            publish(connection, client->queue, client->mandatory, &properties, client->request);
        }
        if (several) cork(connection, false);
        // All replies that have come in, so that the next requests leave together, too.
        do {
            read_delivery(connection, &reply, &timeout);
            char id[NUMBER_MAX_BYTES] = "";
            if (reply.correlation_id.len < sizeof id)
                memcpy(id, reply.correlation_id.bytes, reply.correlation_id.len);
            uint64_t call = strtoull(id, NULL, 10) - first_id;
            amqp_maybe_release_buffers(connection);
            if (call >= sent || sent_s[call] == 0) continue; // nobody's, or its second reply
            at_s = now_s();
            result.latencies_s[result.ok + result.wrong] = at_s - sent_s[call];
            sent_s[call] = 0;
            in_flight--;
            if (reply.body_size == client->expected.len &&
                memcmp(reply.body, client->expected.bytes, reply.body_size) == 0)
                result.ok++;
            else result.wrong++;
        } while (more_is_here(connection));
    }
    result.seconds = at_s - began_s;
    free(sent_s);
    free(reply.body);
    return result;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// A body in which no octet is like its neighbour, and no frame like the next.
static amqp_bytes_t octets(size_t size) {
    unsigned char *bytes = malloc(size);
    if (!bytes) die("--size", "no memory for it");
    for (size_t i = 0; i < size; i++) bytes[i] = i % 251;
    return (amqp_bytes_t){size, bytes};
}

static int client(const options_t *options) {
    client_t client = {
        .connection = open_connection(options->url),
        .queue = amqp_cstring_bytes(options->queue),
        .concurrency = options->concurrency,
        .expiration = options->expiration,
        .mandatory = options->mandatory,
    };
    char request[NUMBER_MAX_BYTES], expected[NUMBER_MAX_BYTES];
    snprintf(request, sizeof request, "%" PRIu32, options->argument);
    snprintf(expected, sizeof expected, "%" PRIu64, fib(options->argument));
    client.request = amqp_cstring_bytes(request);
    client.expected = amqp_cstring_bytes(expected);
    if (options->size) client.request = client.expected = octets(options->size);

    amqp_queue_declare_ok_t *declared = amqp_queue_declare(
        client.connection, CHANNEL, amqp_empty_bytes, false, false, true, true, amqp_empty_table);
    check_reply("declare the callback queue", amqp_get_rpc_reply(client.connection));
    client.callback_queue = amqp_bytes_malloc_dup(declared->queue);
    amqp_basic_consume(client.connection, CHANNEL, client.callback_queue, amqp_empty_bytes, false,
                       true, true, amqp_empty_table);
    check_reply("consume", amqp_get_rpc_reply(client.connection));

    call_many(&client, options->warmup);
    result_t result = call_many(&client, options->requests);
    uint32_t count = options->requests;
    qsort(result.latencies_s, count, sizeof(double), ascending);
    printf("{\"requests\":%" PRIu32 ",\"ok\":%" PRIu32 ",\"wrong\":%" PRIu32
           ",\"seconds\":%.6f,\"rate\":%.1f,\"latency_ms\":{\"p50\":%.4f,\"p99\":%.4f}}\n",
           count, result.ok, result.wrong, result.seconds, count / result.seconds,
           1e3 * result.latencies_s[count / 2], 1e3 * result.latencies_s[count * 99ull / 100]);
    amqp_connection_close(client.connection, AMQP_REPLY_SUCCESS);
    return result.ok == count ? 0 : 1;
}

// --- Command line ------------------------------------------------------------------------------

int main(int argc, char **argv) {
    options_t options = {0};
    for (int i = 2; i + 1 < argc; i += 2) {
        const char *value = argv[i + 1];
        uint32_t number = strtoul(value, NULL, 10);
        if (strcmp(argv[i], "--url") == 0) options.url = value;
        else if (strcmp(argv[i], "--queue") == 0) options.queue = value;
        else if (strcmp(argv[i], "--workers") == 0) options.workers = number;
        else if (strcmp(argv[i], "--prefetch") == 0) options.prefetch = number;
        else if (strcmp(argv[i], "--requests") == 0) options.requests = number;
        else if (strcmp(argv[i], "--warmup") == 0) options.warmup = number;
        else if (strcmp(argv[i], "--concurrency") == 0) options.concurrency = number;
        else if (strcmp(argv[i], "--argument") == 0) options.argument = number;
        else if (strcmp(argv[i], "--echo") == 0) options.echo = number;
        else if (strcmp(argv[i], "--size") == 0) options.size = number;
        else if (strcmp(argv[i], "--expiration") == 0) options.expiration = value;
        else if (strcmp(argv[i], "--mandatory") == 0) options.mandatory = number;
        else die(argv[i], "no such option");
    }
    if (argc < 2 || !options.url || !options.queue) die("usage", "see the head of peer.c");
    if (strcmp(argv[1], "server") == 0) return server(&options);
    if (strcmp(argv[1], "client") == 0) return client(&options);
    die(argv[1], "neither server nor client");
}
