/* Threads that serve the faults of one range, by how they are placed. Every mechanism shares the loop of `run`:
 * wait, read a batch, fill, look after the placement. */
#define _GNU_SOURCE
#include "floor.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { BATCH_MESSAGES = 16, WORKERS_MAX = 64, REVIEW_FAULTS = 64, DISARM_SHARE = 16, CPU_LINE_BYTES = 512 };

struct worker {
    struct serve *serve;
    struct serve_counts counts;         /* owner: the worker; read by others after join */
    pthread_t thread;
    int cpu;                            /* where it is pinned; -1: free */
    int epoll_fd;
    int started;
    _Atomic int armed;                  /* in its epoll set; changed only with `changing` held */
    uint64_t reads, reviewed_reads;     /* owner: the worker */
    int deep;                           /* owner: the worker; set by its review */
    uint64_t reviewed_served;           /* by whoever holds the review; the count it saw last */
    _Atomic uint64_t served;            /* owner: the worker; reviewers read it */
} __attribute__((aligned(128)));

struct serve {
    struct range range;
    struct serve_options options;
    int stop_fd;
    int cpus;
    _Atomic int stop;
    _Atomic int armed_workers;
    /* Flag and epoll set must change as one: a worker that believed itself armed could else disarm the last one. Who
     * can't have it at once does without: both arming and disarming are only hints. */
    atomic_flag changing;
    struct worker workers[WORKERS_MAX];
};

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int pin_to(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    return -pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

/* The CPU on which thread `tid` of this process last ran. It sleeps in its fault: that holds until it is woken. */
static int cpu_of_thread(uint32_t tid)
{
    char path[64], line[CPU_LINE_BYTES];
    snprintf(path, sizeof path, "/proc/self/task/%u/stat", tid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    ssize_t nbytes = read(fd, line, sizeof line - 1);
    close(fd);
    if (nbytes <= 0)
        return -EIO;
    line[nbytes] = 0;
    char *at = strrchr(line, ')');      /* the name before it may hold spaces and brackets */
    for (int field = 2; at && field < 39; field++)
        at = strchr(at + 1, ' ');
    return at ? atoi(at + 1) : -EIO;
}

static int arm(struct worker *worker)
{
    if (atomic_load(&worker->armed))
        return 0;
    uint32_t exclusive = worker->serve->options.placement == PLACE_EXCLUSIVE ? EPOLLEXCLUSIVE : 0;
    struct epoll_event event = {.events = EPOLLIN | exclusive, .data.fd = worker->serve->range.uffd};
    /* Adding it to a set that its worker sleeps on also wakes that worker when a fault is pending. */
    if (epoll_ctl(worker->epoll_fd, EPOLL_CTL_ADD, worker->serve->range.uffd, &event) < 0)
        return -errno;
    atomic_store(&worker->armed, 1);
    atomic_fetch_add(&worker->serve->armed_workers, 1);
    return 1;
}

/* Never of the worker that asks for it, while that one is armed: so one always is. */
static void disarm(struct worker *worker)
{
    epoll_ctl(worker->epoll_fd, EPOLL_CTL_DEL, worker->serve->range.uffd, NULL);
    atomic_store(&worker->armed, 0);
    atomic_fetch_sub(&worker->serve->armed_workers, 1);
}

/* With more workers than CPUs (a larger machine simulated), those of one CPU are told apart by the faulting thread. */
static struct worker *worker_for(struct serve *serve, int cpu, uint32_t tid)
{
    int per_cpu = serve->options.workers / serve->cpus;
    int index = cpu + (per_cpu > 1 ? (int)(tid % (uint32_t)per_cpu) * serve->cpus : 0);
    return &serve->workers[index % serve->options.workers];
}

static void follow(struct worker *worker, uint32_t tid)
{
    uint64_t start_ns = now_ns();
    int cpu = cpu_of_thread(tid);
    worker->counts.sampled++;
    worker->counts.sample_ns += now_ns() - start_ns;
    if (cpu < 0)
        return;
    if (worker->serve->options.placement == PLACE_ONE_CHASES) {
        if (cpu != worker->cpu && pin_to(cpu) == 0) {
            worker->cpu = cpu;
            worker->counts.armed++;
        }
    } else if (!atomic_flag_test_and_set(&worker->serve->changing)) {
        worker->counts.armed += arm(worker_for(worker->serve, cpu, tid)) > 0;
        atomic_flag_clear(&worker->serve->changing);
    }
}

/* Whether each read of late brought several faults: then more threads fault than can run, the worker need not sleep
 * between faults, and a second one would only take CPU time from the faulting threads. */
static int is_deep(struct worker *worker)
{
    uint64_t reads = worker->reads - worker->reviewed_reads;
    worker->reviewed_reads = worker->reads;
    uint64_t deep_faults = (uint64_t)worker->serve->options.deep_faults;
    worker->deep = deep_faults && reads * deep_faults <= REVIEW_FAULTS;
    return worker->deep;
}

/* A worker that is woken in vain sleeps on inside epoll_wait and can't know it: the one that serves disarms those which
 * served less than one in DISARM_SHARE of the faults since the last review. */
static void review(struct worker *reviewer)
{
    struct serve *serve = reviewer->serve;
    uint64_t recent[WORKERS_MAX], sum = 0;
    int deep = is_deep(reviewer);
    if (atomic_flag_test_and_set(&serve->changing))
        return;
    for (int i = 0; i < serve->options.workers; i++) {
        struct worker *worker = &serve->workers[i];
        uint64_t served = atomic_load_explicit(&worker->served, memory_order_relaxed);
        recent[i] = served - worker->reviewed_served;
        worker->reviewed_served = served;
        sum += recent[i];
    }
    for (int i = 0; i < serve->options.workers; i++) {
        struct worker *worker = &serve->workers[i];
        int rare = deep || recent[i] * DISARM_SHARE < sum;
        if (worker == reviewer || !rare || !atomic_load(&worker->armed) || !atomic_load(&reviewer->armed))
            continue;
        disarm(worker);
        reviewer->counts.disarmed++;
    }
    atomic_flag_clear(&serve->changing);
}

static ssize_t read_batch(struct worker *worker, struct uffd_msg *messages)
{
    uint64_t spin_until_ns = worker->serve->options.spin_ns ? now_ns() + worker->serve->options.spin_ns : 0;
    ssize_t nbytes;
    do
        nbytes = read(worker->serve->range.uffd, messages, BATCH_MESSAGES * sizeof *messages);
    while (nbytes < 0 && spin_until_ns && now_ns() < spin_until_ns && !atomic_load(&worker->serve->stop));
    return nbytes < 0 ? -errno : nbytes;
}

static void serve_fault(struct worker *worker, const struct uffd_msg *message)
{
    const struct serve_options *options = &worker->serve->options;
    int looks = options->placement == PLACE_FOLLOW || options->placement == PLACE_ONE_CHASES;
    uint64_t served = atomic_load_explicit(&worker->served, memory_order_relaxed);
    if (message->event != UFFD_EVENT_PAGEFAULT)
        return;
    if (looks && !worker->deep && served % (uint64_t)options->sample_every == 0)
        follow(worker, message->arg.pagefault.feat.ptid);
    range_fill(&worker->serve->range, message->arg.pagefault.address);
    atomic_store_explicit(&worker->served, served + 1, memory_order_relaxed);
    if (options->placement == PLACE_FOLLOW && (served + 1) % REVIEW_FAULTS == 0)
        review(worker);
}

static void serve_batch(struct worker *worker)
{
    struct uffd_msg messages[BATCH_MESSAGES];
    const struct serve_options *options = &worker->serve->options;
    ssize_t nbytes;
    while ((nbytes = read_batch(worker, messages)) > 0) {
        worker->reads++;
        for (size_t i = 0; i < (size_t)nbytes / sizeof *messages; i++)
            serve_fault(worker, &messages[i]);
        if (!options->spin_ns)          /* one more read would only say EAGAIN; epoll_wait looks anyway */
            return;
    }
}

static void *run(void *argument)
{
    struct worker *worker = argument;
    struct serve *serve = worker->serve;
    struct sched_param parameters = {0};
    if (worker->cpu >= 0)
        pin_to(worker->cpu);
    pthread_setschedparam(pthread_self(), serve->options.policy, &parameters);
    while (!atomic_load(&serve->stop)) {
        struct epoll_event events[2];
        if (serve->options.placement == PLACE_READ) {
            serve_batch(worker);
            continue;
        }
        int ready = epoll_wait(worker->epoll_fd, events, 2, -1);
        for (int i = 0; i < ready; i++)
            if (events[i].data.fd == serve->range.uffd)
                serve_batch(worker);
    }
    struct rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    worker->counts.wakeups = (uint64_t)usage.ru_nvcsw;
    return NULL;
}

static int worker_start(struct serve *serve, int index)
{
    struct worker *worker = &serve->workers[index];
    int placement = serve->options.placement;
    worker->serve = serve;
    worker->cpu = index % serve->cpus;
    if (placement == PLACE_ONE_FREE || placement == PLACE_ONE_SPIN || placement == PLACE_ONE_CHASES)
        worker->cpu = -1;
    if (placement == PLACE_ONE_PINNED)
        worker->cpu = serve->options.cpu;
    worker->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = serve->stop_fd};
    if (worker->epoll_fd < 0 || epoll_ctl(worker->epoll_fd, EPOLL_CTL_ADD, serve->stop_fd, &event) < 0)
        return -errno;
    int error = arm(worker);
    if (error < 0)
        return error;
    error = pthread_create(&worker->thread, NULL, run, worker);
    worker->started = error == 0;
    return -error;
}

struct serve *serve_start(const struct range *range, const struct serve_options *options)
{
    struct serve *serve = aligned_alloc(128, sizeof *serve);
    if (!serve)
        return NULL;
    memset(serve, 0, sizeof *serve);
    serve->range = *range;
    serve->options = *options;
    if (serve->options.sample_every < 1)
        serve->options.sample_every = 1;
    serve->cpus = (int)sysconf(_SC_NPROCESSORS_ONLN);
    serve->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (options->placement == PLACE_READ)
        fcntl(range->uffd, F_SETFL, 0);
    int error = serve->stop_fd < 0 || options->workers < 1 || options->workers > WORKERS_MAX ? -EINVAL : 0;
    for (int i = 0; i < options->workers && !error; i++)
        error = worker_start(serve, i);
    if (error) {
        serve_stop(serve, NULL);
        errno = -error;
        return NULL;
    }
    return serve;
}

/* A worker that sleeps in read() hears no eventfd: each gets a fault of its own, on pages that nobody touched. */
static void end_readers(struct serve *serve)
{
    const size_t spare = serve->range.nbytes - (size_t)serve->options.workers * serve->range.block_bytes;
    for (int i = 0; i < serve->options.workers; i++) {
        (void)*(volatile const uint8_t *)(serve->range.base + spare + (size_t)i * serve->range.block_bytes);
        usleep(1000);
    }
}

int serve_stop(struct serve *serve, struct serve_counts *counts)
{
    uint64_t one = 1;
    struct serve_counts sum = {.armed_at_end = (uint64_t)atomic_load(&serve->armed_workers)};
    atomic_store(&serve->stop, 1);
    if (write(serve->stop_fd, &one, sizeof one) < 0)
        return -errno;
    if (serve->options.placement == PLACE_READ)
        end_readers(serve);
    for (int i = 0; i < serve->options.workers; i++) {
        struct worker *worker = &serve->workers[i];
        if (worker->started)
            pthread_join(worker->thread, NULL);
        if (worker->epoll_fd > 0)
            close(worker->epoll_fd);
        sum.served += worker->served;
        sum.wakeups += worker->counts.wakeups;
        sum.armed += worker->counts.armed;
        sum.disarmed += worker->counts.disarmed;
        sum.sampled += worker->counts.sampled;
        sum.sample_ns += worker->counts.sample_ns;
    }
    if (counts)
        *counts = sum;
    close(serve->stop_fd);
    free(serve);
    return 0;
}
