/*
 * A client of hwbpd that needs no library: ZMTP and msgpack are written out here, as docs/protocol.md tells them.
 *
 *     cc -Wall -Wextra -o client examples/client.c
 *
 *     ./client SOCKET [N]       watch a variable of its own, write to it N times, print every hit, and leave
 *     ./client --relay SOCKET   send each line of the input, a message in hexadecimal; print what comes as JSON
 *     ./client --read           the same without a daemon: print each line of the input, a message in hexadecimal
 *
 * With --relay the last line is "lost" when the daemon ends the connection; at the end of the input we end it.
 */
#define _GNU_SOURCE
#include <inttypes.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

static _Noreturn void die(const char *why)
{
    fprintf(stderr, "client: %s\n", why);
    exit(1);
}

struct buffer { /* bytes that grow */
    uint8_t *bytes;
    size_t size, room;
};

static uint8_t *grow(struct buffer *b, size_t more)
{
    if (b->size + more > b->room) {
        b->room = 2 * (b->size + more);
        if (!(b->bytes = realloc(b->bytes, b->room)))
            die("out of memory");
    }
    b->size += more;
    return b->bytes + b->size - more;
}

static void put(struct buffer *b, const void *bytes, size_t size) { memcpy(grow(b, size), bytes, size); }

static void put_number(struct buffer *b, uint64_t number, int size) /* most significant byte first */
{
    while (size--)
        *grow(b, 1) = number >> 8 * size;
}

/* --- msgpack: writing; a small map, short text and numbers in their longest form are all that we send ------------- */

static void put_text(struct buffer *b, const char *text)
{
    put_number(b, 0xd9, 1);
    put_number(b, strlen(text), 1);
    put(b, text, strlen(text));
}

static void put_number_field(struct buffer *b, const char *name, uint64_t value)
{
    put_text(b, name);
    put_number(b, 0xcf, 1);
    put_number(b, value, 8);
}

static void put_text_field(struct buffer *b, const char *name, const char *value)
{
    put_text(b, name);
    put_text(b, value);
}

/* Begin a message: a map with so many fields beside op and id. */
static struct buffer begin(const char *op, uint64_t id, int fields)
{
    struct buffer b = {0};
    put_number(&b, 0x80 + 2 + fields, 1);
    put_text_field(&b, "op", op);
    put_number_field(&b, "id", id);
    return b;
}

/* --- msgpack: reading --------------------------------------------------------------------------------------------- */

struct reader { /* what has not been read yet */
    const uint8_t *at, *end;
};

struct value { /* a number in .number, or as many bytes, elements or pairs; of the last two the contents come next */
    enum { NIL, FLAG, UNSIGNED, SIGNED, TEXT, BINARY, ARRAY, MAP } is;
    uint64_t number;
    const uint8_t *bytes;
};

static const uint8_t *take(struct reader *r, uint64_t size)
{
    if (size > (uint64_t)(r->end - r->at))
        die("a message is cut short");
    r->at += size;
    return r->at - size;
}

static uint64_t take_number(struct reader *r, int size)
{
    uint64_t number = 0;
    for (const uint8_t *at = take(r, size); size--; at++)
        number = number << 8 | *at;
    return number;
}

static struct value next(struct reader *r)
{
    uint8_t c = *take(r, 1);
    struct value v = {.is = UNSIGNED, .number = c};
    if (c >= 0x80 && c < 0x90)
        v = (struct value){.is = MAP, .number = c & 15};
    else if (c >= 0x90 && c < 0xa0)
        v = (struct value){.is = ARRAY, .number = c & 15};
    else if (c >= 0xa0 && c < 0xc0)
        v = (struct value){.is = TEXT, .number = c & 31};
    else if (c == 0xc0)
        v.is = NIL;
    else if (c == 0xc2 || c == 0xc3)
        v = (struct value){.is = FLAG, .number = c & 1};
    else if (c >= 0xc4 && c <= 0xc6)
        v = (struct value){.is = BINARY, .number = take_number(r, 1 << (c - 0xc4))};
    else if (c >= 0xcc && c <= 0xcf)
        v.number = take_number(r, 1 << (c - 0xcc));
    else if (c >= 0xd0 && c <= 0xd3) {
        int unused_bits = 64 - (8 << (c - 0xd0));
        v = (struct value){.is = SIGNED, .number = take_number(r, 1 << (c - 0xd0)) << unused_bits};
        v.number = (int64_t)v.number >> unused_bits; /* with the sign */
    } else if (c >= 0xd9 && c <= 0xdb)
        v = (struct value){.is = TEXT, .number = take_number(r, 1 << (c - 0xd9))};
    else if (c == 0xdc || c == 0xdd)
        v = (struct value){.is = ARRAY, .number = take_number(r, 2 << (c - 0xdc))};
    else if (c == 0xde || c == 0xdf)
        v = (struct value){.is = MAP, .number = take_number(r, 2 << (c - 0xde))};
    else if (c >= 0xe0)
        v = (struct value){.is = SIGNED, .number = (int64_t)(int8_t)c};
    else if (c >= 0x80)
        die("a message holds what this protocol does not know");
    if (v.is == TEXT || v.is == BINARY)
        v.bytes = take(r, v.number);
    return v;
}

static void skip(struct reader *r)
{
    struct value v = next(r);
    if (v.is == ARRAY || v.is == MAP)
        for (uint64_t left = v.is == MAP ? 2 * v.number : v.number; left--;)
            skip(r);
}

static void print(struct reader *r) /* as JSON; {"bin": ...} for binary */
{
    struct value v = next(r);
    switch (v.is) {
    case NIL: printf("null"); break;
    case FLAG: printf(v.number ? "true" : "false"); break;
    case UNSIGNED: printf("%" PRIu64, v.number); break;
    case SIGNED: printf("%" PRId64, (int64_t)v.number); break;
    case TEXT:
        putchar('"');
        for (uint64_t i = 0; i < v.number; i++)
            if (v.bytes[i] < ' ' || v.bytes[i] == '"' || v.bytes[i] == '\\')
                printf("\\u%04x", v.bytes[i]);
            else
                putchar(v.bytes[i]);
        putchar('"');
        break;
    case BINARY:
        printf("{\"bin\": \"");
        for (uint64_t i = 0; i < v.number; i++)
            printf("%02x", v.bytes[i]);
        printf("\"}");
        break;
    case ARRAY:
    case MAP:
        putchar(v.is == MAP ? '{' : '[');
        for (uint64_t i = 0; i < v.number; i++) {
            printf(i ? ", " : "");
            print(r);
            if (v.is == MAP) {
                printf(": ");
                print(r);
            }
        }
        putchar(v.is == MAP ? '}' : ']');
    }
}

static void print_line(struct reader message)
{
    print(&message);
    putchar('\n');
    fflush(stdout);
}

/* The value of a field, or nil where the message has none of that name. */
static struct value field(struct reader message, const char *name)
{
    struct value map = next(&message);
    for (uint64_t i = 0; map.is == MAP && i < map.number; i++) {
        struct value key = next(&message);
        if (key.is == TEXT && key.number == strlen(name) && !memcmp(key.bytes, name, key.number))
            return next(&message);
        skip(&message);
    }
    return (struct value){.is = NIL};
}

static bool is_op(struct reader message, const char *op)
{
    struct value v = field(message, "op");
    return v.is == TEXT && v.number == strlen(op) && !memcmp(v.bytes, op, v.number);
}

/* --- ZMTP --------------------------------------------------------------------------------------------------------- */

static bool send_all(int fd, const void *bytes, size_t size)
{
    for (const uint8_t *at = bytes; size;) {
        ssize_t sent = send(fd, at, size, MSG_NOSIGNAL);
        if (sent <= 0)
            return false;
        at += sent, size -= sent;
    }
    return true;
}

static bool receive_all(int fd, void *bytes, size_t size)
{
    for (uint8_t *at = bytes; size;) {
        ssize_t received = recv(fd, at, size, 0);
        if (received <= 0)
            return false;
        at += received, size -= received;
    }
    return true;
}

/* Receive a frame into ``frame``; what was in it before is gone. False when the connection is lost. */
static bool receive_frame(int fd, struct buffer *frame, struct reader *r, bool *is_command)
{
    uint8_t flags, size[8];
    if (!receive_all(fd, &flags, 1) || !receive_all(fd, size, flags & 2 ? 8 : 1))
        return false;
    struct reader number = {size, size + sizeof size};
    size_t body = take_number(&number, flags & 2 ? 8 : 1);
    frame->size = 0;
    if (!receive_all(fd, grow(frame, body), body))
        return false;
    *r = (struct reader){frame->bytes, frame->bytes + body};
    *is_command = flags & 4;
    return true;
}

/* Connect to the daemon and shake hands. */
static int connect_to(const char *path)
{
    static const uint8_t greeting[64] = {0xff, [9] = 0x7f, 3, 0, 'N', 'U', 'L', 'L'};
    static const uint8_t ready[] = "\x04\x1c\x05READY\x0bSocket-Type\0\0\0\x06" "DEALER";
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    uint8_t theirs[64];
    struct buffer frame = {0};
    struct reader r;
    bool is_command;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (strlen(path) >= sizeof address.sun_path)
        die("the path of the socket is too long");
    strcpy(address.sun_path, path);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
        die("nobody listens there");
    if (!send_all(fd, greeting, sizeof greeting) || !send_all(fd, ready, sizeof ready - 1) ||
        !receive_all(fd, theirs, sizeof theirs) || theirs[0] != 0xff || theirs[10] < 3 ||
        !receive_frame(fd, &frame, &r, &is_command) || !is_command)
        die("whoever listens there does not speak ZMTP 3, or turned us away");
    free(frame.bytes);
    return fd;
}

static bool send_message(int fd, const struct buffer *message)
{
    struct buffer head = {0};
    bool is_long = message->size > 255;
    put_number(&head, is_long ? 2 : 0, 1);
    put_number(&head, message->size, is_long ? 8 : 1);
    bool sent = send_all(fd, head.bytes, head.size) && send_all(fd, message->bytes, message->size);
    free(head.bytes);
    return sent;
}

/* --- a session ---------------------------------------------------------------------------------------------------- */

struct record { /* of a hit, without a call chain */
    uint32_t type;
    uint16_t where, size;
    uint64_t ip;
    uint32_t pid, tid;
    uint64_t time_ns, address;
    uint32_t cpu, zero;
};

static void print_hits(struct reader message)
{
    struct value records = field(message, "records");
    struct record hit;
    for (uint64_t at = 0; at + sizeof hit <= records.number; at += hit.size) {
        memcpy(&hit, records.bytes + at, sizeof hit);
        if (hit.size < sizeof hit)
            die("a record is too short");
        printf("hit: tid %u wrote to %#" PRIx64 " on cpu %u, right before %#" PRIx64 "\n", hit.tid, hit.address,
               hit.cpu, hit.ip);
    }
}

/* Send a request, print the notices that come before its reply, and return that; refusals end the program. */
static struct reader ask(int fd, struct buffer *request, struct buffer *message)
{
    static uint64_t last_id;
    struct reader r;
    bool is_command;

    last_id++;
    if (!send_message(fd, request))
        die("the connection is lost");
    free(request->bytes);
    while (receive_frame(fd, message, &r, &is_command)) {
        if (is_command)
            continue;
        if (is_op(r, "hits"))
            print_hits(r);
        else if (is_op(r, "error")) {
            struct value why = field(r, "sentence");
            fprintf(stderr, "client: refused: %.*s\n", (int)why.number, (const char *)why.bytes);
            exit(1);
        } else if (field(r, "id").number == last_id && field(r, "id").is == UNSIGNED)
            return r;
        else
            print_line(r); /* another notice */
    }
    die("the connection is lost");
}

static volatile _Alignas(8) uint64_t watched;

static void watch_ourselves(const char *path, uint64_t times)
{
    int fd = connect_to(path);
    struct buffer message = {0};

    struct buffer request = begin("hello", 1, 2);
    put_number_field(&request, "version", 1);
    put_text_field(&request, "client", "client.c");
    uint64_t epoch = field(ask(fd, &request, &message), "epoch").number;

    request = begin("claim", 2, 6);
    put_number_field(&request, "epoch", epoch);
    put_number_field(&request, "address", (uintptr_t)&watched);
    put_number_field(&request, "length", sizeof watched);
    put_text_field(&request, "access", "w");
    put_number_field(&request, "tid", syscall(SYS_gettid));
    put_text(&request, "kernel");
    put_number(&request, 0xc2, 1); /* false */
    uint64_t claim = field(ask(fd, &request, &message), "claim").number;

    for (uint64_t i = 1; i <= times; i++)
        watched = i;

    request = begin("release", 3, 2);
    put_number_field(&request, "epoch", epoch);
    put_number_field(&request, "claim", claim);
    struct reader released = ask(fd, &request, &message);
    printf("hits: %" PRIu64 ", delivered: %" PRIu64 "\n", field(released, "hits").number,
           field(released, "delivered").number);

    request = begin("goodbye", 4, 1);
    put_number_field(&request, "epoch", epoch);
    ask(fd, &request, &message);
    close(fd);
    free(message.bytes);
}

/* --- for tests ---------------------------------------------------------------------------------------------------- */

static int digit(char c) { return c >= 'a' ? c - 'a' + 10 : c - '0'; }

/* Read a line of hexadecimal digits, in small letters; false at the end of the input. */
static bool read_line(struct buffer *message)
{
    static char *line;
    static size_t room;
    if (getline(&line, &room, stdin) < 0)
        return false;
    message->size = 0;
    for (const char *at = line; at[0] > ' ' && at[1] > ' '; at += 2)
        *grow(message, 1) = 16 * digit(at[0]) + digit(at[1]);
    return true;
}

static void relay(const char *path)
{
    int fd = connect_to(path);
    struct pollfd ends[] = {{.fd = 0, .events = POLLIN}, {.fd = fd, .events = POLLIN}};
    struct buffer message = {0};
    struct reader r;
    bool is_command;

    setvbuf(stdin, NULL, _IONBF, 0); /* poll does not see what stdio holds back */
    while (poll(ends, 2, -1) > 0) {
        if (ends[1].revents) {
            if (!receive_frame(fd, &message, &r, &is_command))
                break;
            if (!is_command)
                print_line(r);
        } else if (!read_line(&message))
            return;
        else
            send_message(fd, &message); /* a lost connection shows when we read */
    }
    puts("lost");
}

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "--relay"))
        relay(argv[2]);
    else if (argc == 2 && !strcmp(argv[1], "--read")) {
        struct buffer message = {0};
        while (read_line(&message))
            print_line((struct reader){message.bytes, message.bytes + message.size});
    } else if (argc == 2 || argc == 3)
        watch_ourselves(argv[1], argc == 3 ? strtoull(argv[2], NULL, 10) : 3);
    else
        die("usage: client SOCKET [N] | client --relay SOCKET | client --read");
    return 0;
}
