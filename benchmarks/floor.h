/* What the benchmarks' plain C side offers to Python (ctypes). Every function answers 0 or more, or -errno.
 * floor.c: the least work that each row of the table needs. placement.c: threads that serve faults, by their place. */
#ifndef UFFD_BENCHMARKS_FLOOR_H
#define UFFD_BENCHMARKS_FLOOR_H

#include <stddef.h>
#include <stdint.h>

/* A range of anonymous or memfd memory registered with a userfaultfd of its own. `source` holds what its blocks are
 * filled with: block i comes from source + i * block_bytes, modulo source_nbytes. */
struct range {
    uint8_t *base;
    uint8_t *second;        /* shared ranges: the mapping through which a fill writes; else NULL */
    const uint8_t *source;
    size_t nbytes;
    size_t source_nbytes;
    size_t block_bytes;
    int uffd;
    int memfd;
};

/* How a fault reaches the code that fills it. */
enum delivery { DELIVERY_THREAD, DELIVERY_INLINE, DELIVERY_INLINE_SHARED };

int range_open(struct range *range, size_t nbytes, size_t block_bytes, const uint8_t *source, size_t source_nbytes,
               int delivery);
void range_close(struct range *range);
size_t range_struct_bytes(void);

/* Fill the block of `address`. EEXIST counts as success: somebody else was first, and the page is already right. */
int range_fill(const struct range *range, uint64_t address);

/* Memory touched by `threads` threads at once, each taking its share of `offsets` in order. cpu: -1 lets them move.
 * wait_ns[i] is what touch i took; cpus[i] is where the thread ran after it. Either may be NULL. */
struct touch {
    const uint8_t *base;
    const uint64_t *offsets;
    size_t count;
    uint32_t *wait_ns;
    int16_t *cpus;
    int threads;
    int cpu;
};
int touch(const struct touch *touch);

/* Which threads wait for faults, and where. ONE_PINNED and PER_CPU are the fixed placements of the table. */
enum placement {
    PLACE_ONE_FREE,         /* one worker that the scheduler puts where it likes */
    PLACE_ONE_PINNED,       /* one worker, pinned to `cpu` */
    PLACE_PER_CPU,          /* `workers` workers, worker i pinned to CPU i, all polling */
    PLACE_EXCLUSIVE,        /* the same with EPOLLEXCLUSIVE: the kernel wakes one of them */
    PLACE_SPIN,             /* PLACE_PER_CPU, each spinning for `spin_ns` before it sleeps */
    PLACE_ONE_SPIN,         /* one free worker that spins for `spin_ns` before it sleeps */
    PLACE_ONE_CHASES,       /* one worker that moves itself to the CPU of the thread that faulted */
    PLACE_FOLLOW,           /* all pinned; only those on CPUs where faults come from are armed */
    PLACE_READ              /* PLACE_PER_CPU without epoll: each sleeps in read() */
};
struct serve_options {
    int placement;
    int workers;
    int cpu;
    int sample_every;       /* PLACE_FOLLOW, PLACE_ONE_CHASES: faults between two looks at the faulter's CPU */
    uint64_t spin_ns;
    int deep_faults;        /* PLACE_FOLLOW: with that many faults per read one worker stays armed; 0: never so */
    int policy;             /* SCHED_OTHER, SCHED_BATCH or SCHED_IDLE */
};
struct serve_counts {
    uint64_t served;
    uint64_t wakeups;       /* times that a worker slept and was woken; those beyond `served` were in vain */
    uint64_t armed;         /* workers told to wait for faults */
    uint64_t disarmed;      /* workers that stopped waiting because others were always first */
    uint64_t armed_at_end;
    uint64_t sampled;       /* looks at a faulting thread's CPU */
    uint64_t sample_ns;
};
struct serve;
struct serve *serve_start(const struct range *range, const struct serve_options *options);
int serve_stop(struct serve *serve, struct serve_counts *counts);

/* Read one byte of every `step_bytes`, in order, in the calling thread. Nanoseconds taken. */
int64_t touch_sequential(const uint8_t *base, size_t nbytes, size_t step_bytes);

/* The whole range filled piece by piece, with nobody waiting for it. Nanoseconds taken, or -errno. */
int64_t fill_bulk(const struct range *range, size_t piece_bytes);

/* The same from a file, by `threads` pinned threads that take pieces in turn: pread into a buffer, then UFFDIO_COPY. */
int64_t fill_from_file(const struct range *range, int fd, size_t piece_bytes, int threads);

/* Blocks filled and taken out again, one by one, in pages that are used again and again: evict.c. */
int64_t evict_cycle(const uint8_t *source, size_t nbytes, size_t block_bytes, const uint64_t *offsets, size_t count);

/* What the kernel takes for tracking, and for the pause of an image: track.c. */
int64_t scan_written(uint8_t *base, size_t nbytes, const uint64_t *offsets, size_t count);
int64_t protect_range(uint8_t *base, size_t nbytes);
int64_t fork_pause(void);

/* A SIGBUS handler fills the faults of `range` in the faulting thread, until inline_remove. One range at a time. */
int inline_install(const struct range *range);
int inline_remove(void);

#endif
