/* The RPC with librabbitmq: a process for each worker, each with its own connection, since the library is
 * single-threaded. It sets TCP_NODELAY by itself. See ../README.md for the arguments. */
#include <amqp.h>
#include <amqp_tcp_socket.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void check(int ok, const char *what) {
    if (!ok) {
        fprintf(stderr, "librabbitmq: %s failed\n", what);
        exit(1);
    }
}

static void check_reply(amqp_connection_state_t conn, const char *what) {
    check(amqp_get_rpc_reply(conn).reply_type == AMQP_RESPONSE_NORMAL, what);
}

static amqp_connection_state_t open_connection(const char *url) {
    char *copy = strdup(url); /* the parser cuts it up */
    struct amqp_connection_info info;
    amqp_default_connection_info(&info);
    check(amqp_parse_url(copy, &info) == AMQP_STATUS_OK, "parsing the URL");
    amqp_connection_state_t conn = amqp_new_connection();
    amqp_socket_t *socket = amqp_tcp_socket_new(conn);
    check(amqp_socket_open(socket, info.host, info.port) == 0, "connecting");
    amqp_rpc_reply_t reply =
        amqp_login(conn, info.vhost, 0, 131072, 0, AMQP_SASL_METHOD_PLAIN, info.user, info.password);
    check(reply.reply_type == AMQP_RESPONSE_NORMAL, "login");
    amqp_channel_open(conn, 1);
    check_reply(conn, "opening a channel");
    free(copy);
    return conn;
}

static unsigned long fib(unsigned n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }

static amqp_bytes_t text(const char *s) { return amqp_cstring_bytes(s); }

static void serve(const char *url, const char *queue, int ready) {
    amqp_connection_state_t conn = open_connection(url);
    amqp_queue_declare(conn, 1, text(queue), 0, 0, 0, 0, amqp_empty_table);
    check_reply(conn, "declaring the queue");
    amqp_basic_qos(conn, 1, 0, 1, 0);
    check_reply(conn, "qos");
    amqp_basic_consume(conn, 1, text(queue), amqp_empty_bytes, 0, 0, 0, amqp_empty_table);
    check_reply(conn, "consuming");
    check(write(ready, "r", 1) == 1, "telling that it is ready");
    for (;;) {
        amqp_envelope_t request;
        amqp_maybe_release_buffers(conn);
        check(amqp_consume_message(conn, &request, NULL, 0).reply_type == AMQP_RESPONSE_NORMAL, "a request");
        char digits[32] = {0}, answer[32];
        size_t len = request.message.body.len < 31 ? request.message.body.len : 31;
        memcpy(digits, request.message.body.bytes, len);
        snprintf(answer, sizeof answer, "%lu", fib(atoi(digits)));
        amqp_basic_properties_t properties = {0};
        properties._flags = AMQP_BASIC_CORRELATION_ID_FLAG | AMQP_BASIC_CONTENT_TYPE_FLAG;
        properties.correlation_id = request.message.properties.correlation_id;
        properties.content_type = text("text/plain");
        check(amqp_basic_publish(conn, 1, amqp_empty_bytes, request.message.properties.reply_to, 0, 0, &properties,
                                 text(answer)) == 0, "a reply");
        check(amqp_basic_ack(conn, 1, request.delivery_tag, 0) == 0, "an acknowledgement");
        amqp_destroy_envelope(&request);
    }
}

static int server(const char *url, const char *queue, int workers) {
    int ready[2];
    check(pipe(ready) == 0, "a pipe");
    for (int i = 0; i < workers; i++) {
        if (fork() == 0) {
            serve(url, queue, ready[1]);
        }
    }
    char byte;
    for (int i = 0; i < workers; i++) check(read(ready[0], &byte, 1) == 1, "a worker");
    puts("ready");
    fflush(stdout);
    wait(NULL);
    return 1;
}

static void request(amqp_connection_state_t conn, const char *queue, amqp_bytes_t callback, unsigned id) {
    char correlation_id[16];
    snprintf(correlation_id, sizeof correlation_id, "%u", id);
    amqp_basic_properties_t properties = {0};
    properties._flags = AMQP_BASIC_CORRELATION_ID_FLAG | AMQP_BASIC_REPLY_TO_FLAG | AMQP_BASIC_CONTENT_TYPE_FLAG;
    properties.correlation_id = text(correlation_id);
    properties.reply_to = callback;
    properties.content_type = text("text/plain");
    check(amqp_basic_publish(conn, 1, amqp_empty_bytes, text(queue), 0, 0, &properties, text("1")) == 0, "a request");
}

/* Takes one answer. Correlation ids are counted, and each must come once. */
static void answer(amqp_connection_state_t conn, char *open) {
    struct timeval patience = {60, 0};
    amqp_envelope_t reply;
    amqp_maybe_release_buffers(conn);
    check(amqp_consume_message(conn, &reply, &patience, 0).reply_type == AMQP_RESPONSE_NORMAL, "an answer");
    char digits[16] = {0};
    amqp_bytes_t id = reply.message.properties.correlation_id;
    memcpy(digits, id.bytes, id.len < 15 ? id.len : 15);
    unsigned index = atoi(digits);
    check(open[index] && reply.message.body.len == 1 && *(char *)reply.message.body.bytes == '1', "a right answer");
    open[index] = 0;
    amqp_destroy_envelope(&reply);
}

static double run(amqp_connection_state_t conn, const char *queue, amqp_bytes_t callback, unsigned requests,
                  unsigned in_flight) {
    char *open = calloc(requests, 1);
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    unsigned sent = 0;
    for (unsigned answered = 0; answered < requests; answered++) {
        while (sent < requests && sent - answered < in_flight) {
            open[sent] = 1;
            request(conn, queue, callback, sent++);
        }
        answer(conn, open);
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    free(open);
    return (end.tv_sec - begin.tv_sec) + (end.tv_nsec - begin.tv_nsec) / 1e9;
}

int main(int argc, char **argv) {
    if (argc == 5 && strcmp(argv[1], "server") == 0) return server(argv[2], argv[3], atoi(argv[4]));
    if (argc != 6 || strcmp(argv[1], "client") != 0) {
        fprintf(stderr, "see bench/peers/README.md\n");
        return 2;
    }
    amqp_connection_state_t conn = open_connection(argv[2]);
    amqp_queue_declare_ok_t *declared =
        amqp_queue_declare(conn, 1, amqp_empty_bytes, 0, 0, 1, 1, amqp_empty_table);
    check_reply(conn, "declaring the callback queue");
    amqp_bytes_t callback = amqp_bytes_malloc_dup(declared->queue);
    amqp_basic_consume(conn, 1, callback, amqp_empty_bytes, 0, 1, 1, amqp_empty_table);
    check_reply(conn, "consuming");
    unsigned requests = atoi(argv[4]), in_flight = atoi(argv[5]);
    run(conn, argv[3], callback, requests / 10 + 1, in_flight);
    printf("%.6f\n", run(conn, argv[3], callback, requests, in_flight));
    return 0;
}
