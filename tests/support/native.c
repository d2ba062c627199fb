/* Native providers and touchers for the tests, compiled once per run. Every wait in here has a deadline. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define ORDER_MAX 16384
#define GATE_TIMEOUT_US 30000000u
#define GATE_STEP_US 500u

/* Laid out as support/native.py's Control. Set before use by one thread; the _Atomic members by any. */
struct control {
    uint64_t seed;
    uint64_t nbytes_max;               /* a fill past this byte is an error: EFBIG */
    _Atomic uint64_t calls;
    _Atomic uint64_t delay_us;
    uint64_t fail_start, fail_stop;    /* bytes [start, stop) fail */
    int64_t fail_errno;
    _Atomic int64_t fail_times;        /* failures left; negative: for ever */
    uint64_t gate_start, gate_stop;    /* fills that touch [start, stop) wait while gate_closed */
    _Atomic uint32_t gate_closed;
    _Atomic uint32_t gate_waiters;
    uint64_t end_start, end_stop;      /* fills that touch [start, stop) end their thread or the process */
    uint32_t end_how;                  /* 1 abort, 2 pthread_exit */
    _Atomic uint32_t overlaps;         /* fills of a block begun while another fill of it ran */
    uint64_t count_block_bytes;
    _Atomic uint32_t *counts;          /* fills per block, NULL: not counted */
    _Atomic uint32_t *running;
    _Atomic uint64_t order_n;
    uint64_t order[ORDER_MAX];         /* offsets in order of arrival */
};

static inline uint64_t pattern_word(uint64_t index, uint64_t seed)
{
    uint64_t x = (index + seed + 1) * 0x9E3779B97F4A7C15u;
    x ^= x >> 29;
    x *= 0xBF58476D1CE4E5B9u;
    return x ^ (x >> 32);
}

static void write_pattern(uint64_t seed, uint64_t offset, unsigned char *block, size_t nbytes)
{
    uint64_t word;
    for (size_t done = 0; done < nbytes; ) {
        uint64_t at = offset + done, inside = at % 8;
        size_t piece = 8 - inside < nbytes - done ? 8 - inside : nbytes - done;
        word = pattern_word(at / 8, seed);
        memcpy(block + done, (unsigned char *)&word + inside, piece);
        done += piece;
    }
}

static int overlaps(uint64_t offset, size_t nbytes, uint64_t start, uint64_t stop)
{
    return offset < stop && offset + nbytes > start;
}

static int pass_gate(struct control *c)
{
    uint32_t waited_us = 0;
    atomic_fetch_add(&c->gate_waiters, 1);
    while (atomic_load(&c->gate_closed) && waited_us < GATE_TIMEOUT_US) {
        usleep(GATE_STEP_US);
        waited_us += GATE_STEP_US;
    }
    atomic_fetch_sub(&c->gate_waiters, 1);
    return waited_us < GATE_TIMEOUT_US ? 0 : -ETIMEDOUT;
}

static int take_failure(struct control *c)
{
    int64_t left = atomic_load(&c->fail_times);
    while (left > 0)
        if (atomic_compare_exchange_weak(&c->fail_times, &left, left - 1))
            return 1;
    return left < 0;
}

static void note_fill(struct control *c, uint64_t offset, size_t nbytes, int begin)
{
    if (!c->counts)
        return;
    for (uint64_t at = offset; at < offset + nbytes; at += c->count_block_bytes) {
        uint64_t block = at / c->count_block_bytes;
        if (begin) {
            atomic_fetch_add(&c->counts[block], 1);
            if (atomic_fetch_add(&c->running[block], 1))
                atomic_fetch_add(&c->overlaps, 1);
        } else {
            atomic_fetch_sub(&c->running[block], 1);
        }
    }
}

int fill_control(void *self, uint64_t offset, void *block, size_t nbytes)
{
    struct control *c = self;
    int answer = 0;
    uint64_t order = atomic_fetch_add(&c->order_n, 1);
    atomic_fetch_add(&c->calls, 1);
    if (order < ORDER_MAX)
        c->order[order] = offset;
    if (c->nbytes_max && offset + nbytes > c->nbytes_max)
        return -EFBIG;
    note_fill(c, offset, nbytes, 1);
    if (overlaps(offset, nbytes, c->gate_start, c->gate_stop))
        answer = pass_gate(c);
    if (atomic_load(&c->delay_us))
        usleep((useconds_t)atomic_load(&c->delay_us));
    if (c->end_how && overlaps(offset, nbytes, c->end_start, c->end_stop)) {
        if (c->end_how == 1)
            abort();
        pthread_exit(NULL);
    }
    if (!answer && overlaps(offset, nbytes, c->fail_start, c->fail_stop) && take_failure(c))
        answer = -(int)c->fail_errno;
    if (!answer)
        write_pattern(c->seed, offset, block, nbytes);
    note_fill(c, offset, nbytes, 0);
    return answer;
}

/* A provider without user data: the plain pattern of seed 0. */
int fill_pattern(void *self, uint64_t offset, void *block, size_t nbytes)
{
    (void)self;
    write_pattern(0, offset, block, nbytes);
    return 0;
}

/* ---- touchers ---- */

uint64_t touch_sum(const unsigned char *memory, size_t nbytes, size_t step)
{
    uint64_t sum = 0;
    for (size_t at = 0; at < nbytes; at += step)
        sum += ((const volatile unsigned char *)memory)[at];
    return sum;
}

/* 0 or 1 + the first wrong byte's offset. */
uint64_t check_pattern(const unsigned char *memory, uint64_t offset, size_t nbytes, uint64_t seed)
{
    unsigned char right[512];
    for (size_t done = 0; done < nbytes; done += sizeof right) {
        size_t piece = nbytes - done < sizeof right ? nbytes - done : sizeof right;
        write_pattern(seed, offset + done, right, piece);
        if (memcmp(memory + done, right, piece))
            for (size_t i = 0; i < piece; i++)
                if (memory[done + i] != right[i])
                    return 1 + done + i;
    }
    return 0;
}

/* 0 if a touch leaves errno as it was. */
int touch_keeps_errno(const volatile unsigned char *memory)
{
    errno = 77;
    (void)*memory;
    return errno == 77 ? 0 : errno;
}

struct toucher { const unsigned char *memory; size_t nbytes, step; uint64_t sum; };

static void *toucher_main(void *arg)
{
    struct toucher *t = arg;
    t->sum = touch_sum(t->memory, t->nbytes, t->step);
    return NULL;
}

/* Touch in a thread that Python has never seen, with a stack of stack_bytes; UINT64_MAX: no thread to be had. */
uint64_t touch_in_pthread(const unsigned char *memory, size_t nbytes, size_t step, size_t stack_bytes)
{
    struct toucher t = {memory, nbytes, step, 0};
    pthread_attr_t attr;
    pthread_t thread;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, stack_bytes);
    if (pthread_create(&thread, &attr, toucher_main, &t))
        return UINT64_MAX;
    pthread_join(thread, NULL);
    pthread_attr_destroy(&attr);
    return t.sum;
}

/* Start a thread that touches and is never joined: for exits in mid-fault. */
int touch_detached(const unsigned char *memory, size_t nbytes, size_t step)
{
    struct toucher *t = malloc(sizeof *t);
    pthread_t thread;
    *t = (struct toucher){memory, nbytes, step, 0};
    return pthread_create(&thread, NULL, toucher_main, t) || pthread_detach(thread);
}

static __thread sigjmp_buf guard;

static void leave_by_jump(int number)
{
    siglongjmp(guard, number);
}

/* Touch under a SIGBUS handler of the program's own that jumps away: the byte, or -SIGBUS. */
int touch_guarded(const volatile unsigned char *memory)
{
    struct sigaction action, before;
    int answer;
    memset(&action, 0, sizeof action);
    action.sa_handler = leave_by_jump;
    if (sigaction(SIGBUS, NULL, &before))
        return -errno;
    if (before.sa_handler == SIG_DFL && sigaction(SIGBUS, &action, NULL))
        return -errno;
    answer = sigsetjmp(guard, 1);
    return answer ? -answer : *memory;
}

int block_sigbus(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGBUS);
    return pthread_sigmask(SIG_BLOCK, &set, NULL);
}

/* ---- signal handlers ---- */

static _Atomic uint64_t handler_calls;
static _Atomic(void *) handler_address;
static _Atomic int handler_code;
static size_t page_bytes;

/* Repair the page that faulted by mapping memory there: the touch goes on and reads zero. */
static void repair_siginfo(int number, siginfo_t *info, void *context)
{
    (void)number;
    (void)context;
    atomic_fetch_add(&handler_calls, 1);
    atomic_store(&handler_address, info->si_addr);
    atomic_store(&handler_code, info->si_code);
    if (info->si_code > 0)
        mmap((void *)((uintptr_t)info->si_addr & ~(uintptr_t)(page_bytes - 1)), page_bytes, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

static void count_plain(int number)
{
    (void)number;
    atomic_fetch_add(&handler_calls, 1);
}

/* how: 0 a plain handler, 1 SA_SIGINFO, 2 SA_SIGINFO on an alternative stack. */
int install_handler(int signal_number, int how)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    if (how) {
        action.sa_sigaction = repair_siginfo;
        action.sa_flags = SA_SIGINFO | (how == 2 ? SA_ONSTACK : 0);
    } else {
        action.sa_handler = count_plain;
        action.sa_flags = SA_RESTART;
    }
    return sigaction(signal_number, &action, NULL);
}

uint64_t handler_count(void) { return atomic_load(&handler_calls); }
void *handler_last_address(void) { return atomic_load(&handler_address); }
int handler_last_code(void) { return atomic_load(&handler_code); }

/* ---- a storm of signals from a thread of its own ---- */

struct storm { pthread_t target, thread; int number; useconds_t period_us; _Atomic int stop; _Atomic uint64_t sent; };

static void *storm_main(void *arg)
{
    struct storm *s = arg;
    while (!atomic_load(&s->stop)) {
        if (pthread_kill(s->target, s->number))
            break;
        atomic_fetch_add(&s->sent, 1);
        usleep(s->period_us);
    }
    return NULL;
}

/* Send signal `number` to the calling thread every period_us until storm_stop. */
struct storm *storm_start(int number, useconds_t period_us)
{
    struct storm *s = calloc(1, sizeof *s);
    s->target = pthread_self();
    s->number = number;
    s->period_us = period_us;
    if (pthread_create(&s->thread, NULL, storm_main, s)) {
        free(s);
        return NULL;
    }
    return s;
}

uint64_t storm_stop(struct storm *s)
{
    uint64_t sent;
    atomic_store(&s->stop, 1);
    pthread_join(s->thread, NULL);
    sent = atomic_load(&s->sent);
    free(s);
    return sent;
}

/* ---- the stress oracle inside the page: a lock, a counter and the page's own number ---- */

struct oracle { _Atomic uint32_t lock; uint32_t owner; uint64_t page; uint64_t count; uint64_t mirror; };

struct bounce_result { uint64_t operations, wrong; };

static int oracle_lock(struct oracle *o, time_t deadline)
{
    uint32_t free_word = 0;
    for (uint64_t spins = 0; !atomic_compare_exchange_weak(&o->lock, &free_word, 1); spins++, free_word = 0)
        if (spins % 1024 == 1023) {
            if (time(NULL) > deadline)
                return -ETIMEDOUT;
            usleep(1);
        }
    return 0;
}

void oracle_write(unsigned char *area, size_t pages, size_t page_nbytes)
{
    for (size_t page = 0; page < pages; page++) {
        struct oracle *o = (struct oracle *)(area + page * page_nbytes);
        *o = (struct oracle){.page = page, .count = 0, .mirror = ~(uint64_t)0};
        write_pattern(page, page * page_nbytes, (unsigned char *)(o + 1), page_nbytes - sizeof *o);
    }
}

/* Visit random pages: take the page's lock, check its counter against its mirror and its number, count up.
   counts[page] (outside the area) is raised in step, so that a lost update is seen at the end. */
int oracle_visit(unsigned char *area, size_t pages, size_t page_nbytes, uint64_t seed, uint64_t visits,
                 _Atomic uint64_t *counts, struct bounce_result *result)
{
    time_t deadline = time(NULL) + 30;
    for (uint64_t i = 0; i < visits; i++) {
        size_t page = pattern_word(i, seed) % pages;
        struct oracle *o = (struct oracle *)(area + page * page_nbytes);
        if (oracle_lock(o, deadline))
            return -ETIMEDOUT;
        if (o->page != page || o->count != ~o->mirror)
            result->wrong++;
        o->count++;
        o->mirror = ~o->count;
        atomic_fetch_add(&counts[page], 1);
        atomic_store(&o->lock, 0);
        result->operations++;
    }
    return 0;
}

/* Pages whose counter, number or filling is not what it must be. */
uint64_t oracle_check(const unsigned char *area, size_t pages, size_t page_nbytes, const uint64_t *counts)
{
    uint64_t wrong = 0;
    for (size_t page = 0; page < pages; page++) {
        const struct oracle *o = (const struct oracle *)(area + page * page_nbytes);
        wrong += o->page != page || o->count != counts[page] || o->mirror != ~counts[page]
                 || check_pattern((const unsigned char *)(o + 1), page * page_nbytes, page_nbytes - sizeof *o, page);
    }
    return wrong;
}

/* ---- a store in memory, for providers that write: what it holds, and how the next writes go wrong ---- */

/* Laid out as support/stores.py's Store. */
struct store {
    unsigned char *bytes;              /* what is stored; a read or write past nbytes is EFBIG */
    uint64_t nbytes;
    _Atomic uint64_t reads, writes, failures;
    _Atomic uint64_t delay_us;         /* of each write */
    uint64_t fail_start, fail_stop;    /* writes that touch [start, stop) answer fail_answer */
    _Atomic int64_t fail_answer;
    _Atomic int64_t fail_times;        /* failures left; negative: for ever */
    uint64_t fail_keeps;               /* bytes of a failed write that are stored all the same */
    uint64_t gate_start, gate_stop;    /* writes that touch [start, stop) wait while gate_closed */
    _Atomic uint32_t gate_closed, gate_waiters;
    uint64_t count_block_bytes;
    _Atomic uint32_t *counts;          /* writes per block, NULL: not counted */
    _Atomic uint32_t *running;
    _Atomic uint32_t overlaps;         /* writes of a block begun while another write of it ran */
    _Atomic uint32_t fail_reads;       /* reads answer EIO while it is set */
};

int store_read(void *self, uint64_t offset, void *block, size_t nbytes)
{
    struct store *s = self;
    atomic_fetch_add(&s->reads, 1);
    if (offset + nbytes > s->nbytes)
        return -EFBIG;
    if (atomic_load(&s->fail_reads))
        return -EIO;
    memcpy(block, s->bytes + offset, nbytes);
    return 0;
}

static void store_note(struct store *s, uint64_t offset, size_t nbytes, int begin)
{
    for (uint64_t at = offset; s->counts && at < offset + nbytes; at += s->count_block_bytes) {
        uint64_t block = at / s->count_block_bytes;
        if (!begin)
            atomic_fetch_sub(&s->running[block], 1);
        else if (atomic_fetch_add(&s->counts[block], 1), atomic_fetch_add(&s->running[block], 1))
            atomic_fetch_add(&s->overlaps, 1);
    }
}

static int store_takes_failure(struct store *s)
{
    int64_t left = atomic_load(&s->fail_times);
    while (left > 0)
        if (atomic_compare_exchange_weak(&s->fail_times, &left, left - 1))
            return 1;
    return left < 0;
}

int store_write(void *self, uint64_t offset, const void *block, size_t nbytes)
{
    struct store *s = self;
    uint32_t waited_us = 0;
    int answer = 0;
    size_t keeps = nbytes;
    if (offset + nbytes > s->nbytes)
        return -EFBIG;
    store_note(s, offset, nbytes, 1);
    if (overlaps(offset, nbytes, s->gate_start, s->gate_stop)) {
        atomic_fetch_add(&s->gate_waiters, 1);
        for (; atomic_load(&s->gate_closed) && waited_us < GATE_TIMEOUT_US; waited_us += GATE_STEP_US)
            usleep(GATE_STEP_US);
        atomic_fetch_sub(&s->gate_waiters, 1);
    }
    if (atomic_load(&s->delay_us))
        usleep((useconds_t)atomic_load(&s->delay_us));
    if (overlaps(offset, nbytes, s->fail_start, s->fail_stop) && store_takes_failure(s)) {
        answer = (int)atomic_load(&s->fail_answer);
        keeps = s->fail_keeps < nbytes ? s->fail_keeps : nbytes;
        atomic_fetch_add(&s->failures, 1);
    }
    memcpy(s->bytes + offset, block, keeps);
    atomic_fetch_add(&s->writes, 1);
    store_note(s, offset, nbytes, 0);
    return answer;
}
