# All data of the core: what a region, a slot, an engine is made of, and the numbers that bound it.
#
# Uses:     _policy.h
# Provides: Region_t, Slot, Engine_t and what they have; states, counters, kinds
#
# ARCHITECTURE.md says who writes each field that several threads see.

cdef extern from "_policy.h" nogil:
    struct policy:
        uint64_t resident_bytes
        uint64_t pool_bytes
        uint64_t hand_bytes
    struct policy_node:
        pass
    void policy_init(policy *p, policy_node *nodes, uint32_t capacity) noexcept
    void policy_limit(policy *p, uint64_t budget_bytes) noexcept
    uint32_t policy_shift(const policy *p, uint32_t node) noexcept
    uint32_t policy_filled(policy *p, uint32_t node, uint64_t ref, uint32_t shift, bint ahead) noexcept
    void policy_rescued(policy *p, uint32_t node) noexcept
    uint32_t policy_victim(policy *p) noexcept
    void policy_pooled(policy *p, uint32_t node) noexcept
    void policy_back(policy *p, uint32_t node) noexcept
    uint32_t policy_drop(policy *p) noexcept
    void policy_redrop(policy *p, uint32_t node) noexcept
    uint32_t policy_gone(policy *p, uint32_t node) noexcept
    void policy_keep(policy *p, uint32_t node) noexcept
    void policy_forget(policy *p, uint32_t node) noexcept
    uint64_t policy_ref(const policy *p, uint32_t node) noexcept
    bint policy_pool_full(const policy *p) noexcept

cdef enum:
    MAX_REGIONS = 65536         # of one process; an id is slot + generation * MAX_REGIONS
    MAX_WORKERS = 112           # base workers, and those that stand in for workers that are stuck
    MAX_BASE_WORKERS = 64
    INLINE_SLOTS = 16           # threads that may fill at once in the SIGBUS handler; others wait their turn
    MAX_HOSTS = 8               # provider hosts of one engine
    HOSTED_SLOT = MAX_WORKERS + INLINE_SLOTS            # one per request of a host, and one for what it offers
    KEEPER_SLOT = HOSTED_SLOT + MAX_HOSTS * 33
    EVICTOR_SLOT = KEEPER_SLOT + 1
    WRITER_SLOT = EVICTOR_SLOT + 1                      # of threads that write back: the writer, and flushes
    WRITERS = 8
    CALL_SLOT = WRITER_SLOT + WRITERS                   # of API calls that evict or discard, by turns
    CALL_SLOTS = 4
    WIRE_SLOT = CALL_SLOT + CALL_SLOTS                  # of migrations' threads, while they place or read blocks
    WIRE_SLOTS = 16
    MAX_SLOTS = WIRE_SLOT + WIRE_SLOTS
    BATCH = 64                  # messages of one read
    MAX_RUN = 512               # blocks of one fill
    STRIPES = 8                 # sets of counters of a region
    BUCKETS = 40                # log2 of nanoseconds, up to 18 minutes
    STREAMS = 8                 # access patterns that read-ahead follows at once, per region
    HISTORY = 16                # demand faults among which a new pattern is looked for
    CREDIT = 4                  # the most of it; earned back by patterns that prove true, and one per 32 touches
    PROVEN = 6                  # touches that fit, after which a pattern is believed
    RING = 512                  # pieces of read-ahead, or handed-off faults, that may be queued
    RECENT = 64                 # blocks that came last, where the budget has few
    TOUCHERS = 64
    CGROUPS = 8
    ERRORS = 64                 # failed blocks whose number of tries is remembered
    NOTES = 1 << 14             # blocks that came, of which the policy has not heard yet
    WATCHES = 8                 # who may ask at once which pages of a region were written
    CLASSES = 13                # pools of moved-out blocks, by block size: 4 KiB to 16 MiB
    EPOCHS = 256                # numbers of a region's spill files; 0 is none

cdef enum:                      # the state of a block: the low bits of its word
    MISSING = 0                 # (zero: an untouched state page says that nothing is here)
    FILLING = 1                 # owned by one slot
    CLEAN = 2                   # present, write-protected: equal to what the provider holds
    UNPROTECTING = 3            # owned by who serves the first write
    DIRTY = 4                   # present, writable
    POISONED = 5                # its fill failed for good: the owner bits hold the errno
    EVICTING = 6                # owned by who takes it out, or drops it
    POOLED = 7                  # moved out, still in memory; equal to what its store holds
    POOLED_DIRTY = 8            # moved out, still in memory, not written back
    COPYING = 9                 # owned by who copies it, to write it back
    STATE_MASK = 15
    WAITERS = 16                # somebody sleeps on the word, or in a fault that was read while the block was busy
    DEAD = 32                   # poisoned, and not to be repaired: a fill that hung may still write there
    KEPT = 128                  # poisoned or being repaired, and it holds pages that were written
    FROM_PARENT = 64            # in a forked child, shared backing: the bytes are in the parent's pages
    OWNER_SHIFT = 8
    OWNER_MASK = 0x1ff
    WRITING = 1 << 17           # CLEAN or POOLED: its bytes are on their way to the store, not acknowledged yet
    SPILLED = 1 << 18           # private region: the store of its bytes is the spill file, no more the provider
    STICKY = WRITING | SPILLED  # flags that stay with a block through all states
    GENERATION_SHIFT = 19       # 13 bits, one more at each claim: no word recurs while somebody compares with it
    GENERATION_ONE = 1 << 19

cdef enum:                      # of a block that a native store has acknowledged, and that was not made durable since
    SYNCED, UNSYNCED, SYNCING
    SYNC_MASK = 3
    LEFT = 4                    # it has left memory since: what is here now was read from the store again
    LOST = 8                    # a sync failed, and it had left

cdef enum:                      # why a block is filled
    DEMAND, READAHEAD, PREFETCH, POPULATE
    REPAIR                      # the program dropped pages of a dirty block, which can't be stored without them

cdef enum:                      # counters of a region
    C_FAULTS_READ, C_FAULTS_WRITE, C_FAULTS_WP, C_DEMAND, C_READAHEAD, C_PREFETCH, C_BYTES, C_DUPLICATES
    C_RETRIES, C_ERRORS, C_POISONED, C_WASTED, C_REPAIRED
    C_EVICTED, C_RESCUED, C_WRITTEN, C_BYTES_WRITTEN, C_WRITE_ERRORS, C_EVICT_WAITS, C_EVICT_BUSY, C_RECYCLED
    C_BYTES_STORED
    COUNTERS

cdef enum:                      # stages, each with a histogram
    H_QUEUE, H_FILL, H_RESOLVE, H_WRITE
    STAGES

cdef enum:                      # how a native provider is called
    FILL_ZERO, FILL_DIRECT, FILL_CALL, FILL_HOST

cdef enum:                      # a slot's life, and the phase of its fill
    SLOT_FREE, SLOT_WORKER, SLOT_RETIRED, SLOT_INLINE, SLOT_HOSTED, SLOT_WRITER
    IDLE = 0
    BUSY = 1                    # the provider has the block; the keeper may take the blocks away (-> TIMED_OUT)
    PLACING = 2                 # the kernel has them; nobody may
    TIMED_OUT = 3
    PHASE_MASK = 3
    RUN_ONE = 4

ctypedef int (*call_fn)(void *self, uint32_t slot, uint64_t offset, void *block, size_t nbytes) noexcept nogil
ctypedef int (*store_fn)(void *self, uint32_t slot, uint64_t offset, const void *block, size_t nbytes) noexcept nogil

cdef struct Fill:               # where blocks come from. Constant while a region uses it.
    int kind
    const char *direct          # FILL_DIRECT: byte 0
    call_fn call
    void (*ahead)(void *self, uint64_t offset, uint64_t nbytes) noexcept nogil  # these will be asked for soon. Or NULL
    store_fn store              # writes bytes back; returning 0 is the acknowledgement. Or NULL
    int (*sync)(void *self) noexcept nogil                      # makes durable what was acknowledged. Or NULL
    bint writes                 # the provider can be written back to, by `store` or in its host
    void (*forget)(void *self, uint32_t slot) noexcept nogil    # a forked child: the slot was in use. Or NULL
    void *self
    uint64_t session            # FILL_HOST: the provider's number in the hosts
    uint32_t one_host           # FILL_HOST: 1 + the host that has it alone, since it can write; 0: all of them
    bint private_memory         # FILL_DIRECT: no file is behind it that could be cut under us
    bint inline_safe            # may run in the SIGBUS handler
    bint may_block              # a fill can take long: others must not queue behind it
    bint packs                  # what is spilled over it is compressed

cdef struct Counters:           # one cache-line-aligned stripe; relaxed adds
    uint64_t n[COUNTERS]
    uint64_t stage[STAGES][BUCKETS]

cdef struct Stream:             # one access pattern; under the region's ahead_lock
    int64_t stride              # in blocks; 0: unused
    int64_t last                # the furthest block that was really asked for
    int64_t next                # the first that has not been asked for ahead
    uint64_t confirmed          # blocks of the pattern that were reached
    uint64_t stamp              # for replacing the least recently used
    uint64_t owed               # blocks asked for on credit, before the pattern had proved itself

cdef struct BlockError:
    uint64_t block
    uint32_t tries
    int32_t error
    uint64_t at                 # of a failed write: which of the region's it was

cdef struct Watch_t:            # somebody who asks which pages of a region are written: _track.pxi
    Region_t *region
    uint64_t first              # pages of the region, [first, end)
    uint64_t end
    uint64_t *bits              # one per page, lazily touched
    bint coarse                 # asks for blocks only

cdef struct Region_t:
    # constant from making to closing
    uint64_t id
    char *base
    uint64_t nbytes             # the user's
    uint64_t span               # rounded up to pages
    uint32_t shift              # log2 of the block size
    uint64_t blocks
    int fd                      # its userfaultfd
    int memfd                   # shared backing, else -1
    char *alias                 # shared backing: the second mapping, through which providers write
    bint minor                  # shared backing, and the kernel has CONTINUE
    bint protect                # read faults are filled write-protected
    bint writable
    bint is_inline
    bint poison                 # the kernel has POISON
    bint zeropage
    bint nested                 # FILL_DIRECT from another region's memory, whose faults somebody must serve
    bint hosted                 # its provider runs in another process
    bint kernel_faults          # those of system calls are served, too
    bint moves                  # pages are moved out and in by the kernel (UFFDIO_MOVE), else copied
    bint guard                  # read-only, in a writable mapping that is write-protected: so that pages can be moved
    bint writes_back            # dirty blocks go to the provider; else to the spill file
    bint volatile_pages         # dirty blocks are dropped under pressure, and made again by the provider
    uint32_t asked              # hosted: requests that it has in use
    void *texts                 # hosted: what the host said about failures, beside `error`
    bint slow                   # a fill can take long: its worker counts as busy
    bint wait_for_ever          # on_error="wait"
    uint64_t timeout_ns
    uint32_t retries
    Fill *fill
    Engine_t *engine
    Counters *counters          # STRIPES of them
    uint32_t *state             # one word per block, lazily touched
    uint8_t *known              # one byte per page of words: 1 before the first word of it changes
    # beside each word, of who owns the block or has the policy's lock
    uint32_t *node              # the policy's node of the block, perhaps a stale one: under policy_lock
    uint32_t *place             # of a pooled block: its slot in the pool; written before POOLED is published
    uint8_t *pins               # calls that pinned the block; 255: for good
    uint32_t *touched           # blocks + 1 in the order in which touches and read-ahead brought them; or NULL
    uint64_t touched_count
    uint8_t *spill              # of a spilled block: which of the spill files; of a native store's: UNSYNCED .. LOST
    Spill_t *spills             # private regions; NULL: nothing can be written back
    uint32_t *packed            # compressed spilling: bytes of each block's image in its file; else NULL
    char name[80]
    char provider[80]
    # seen by several threads
    uint32_t refs               # who uses it now; it is torn down at 0
    uint32_t closing
    uint32_t stuck              # references held by workers whose fill hangs for good
    uint32_t in_child           # after a fork, shared backing: alias holds the parent's dirty blocks
    void *kept                  # Kept: what forked children may still read; under registry_lock
    Watch_t *watch[WATCHES]     # set under registry_lock, read inside `critical`
    uint32_t watched            # how many of them there are
    void *image                 # RegionPart of the image under way; set under registry_lock, read inside `critical`
    uint32_t image_gate         # futex; 1: an image is being begun, and no write is let go
    uint32_t image_turn         # futex: changes whenever a block was saved
    uint64_t odd_block          # of the last SIGBUS that was none of ours, with thread delivery; a heuristic, relaxed
    uint32_t odd_count
    uint32_t gone               # torn down: what Python kept alive for it may go
    uint32_t writing            # blocks on their way to the store; futex
    uint32_t write_turn         # futex: changes whenever a write has ended
    uint32_t flush_at_end       # of a region without arrays: the writer flushes it before it goes
    int32_t flush_error         # of that, and blocks that could not be written
    uint64_t flush_left
    uint64_t write_again_ns     # after a failed write: not before then; relaxed
    uint64_t write_pause_ns
    uint64_t pinned_blocks
    uint64_t pooled_bytes       # relaxed; for who looks
    uint64_t write_failures     # so many, ever
    uint32_t syncing            # one at a time, by CAS
    int32_t sync_lost           # a sync failed after blocks had left memory that it was for; which ones: LOST
    uint32_t unsynced           # the provider acknowledged writes that were not made durable yet
    uint64_t stored_ns          # when a provider in Python acknowledged its latest write; 0: none
    BlockError write_error[ERRORS]  # of blocks whose write failed, by number modulo ERRORS
    Region_t *next_dying
    Part_t *part                # a migration brings it (destination), or sends it (source); NULL
    uint32_t frozen             # a migration has stopped writers; futex
    # read-ahead, under ahead_lock (a try-lock: who does not get it leaves the pattern alone)
    uint32_t ahead_lock
    uint32_t history_at
    uint64_t ahead_blocks       # the largest window
    uint64_t clock
    uint64_t credit             # blocks that unproven patterns may still ask for
    int64_t history[HISTORY]
    Stream stream[STREAMS]
    BlockError error[ERRORS]    # the block's number modulo ERRORS; written by who fails it, before POISONED

cdef struct Slot:               # what one thread needs to fill: a worker's own, or borrowed by the SIGBUS handler
    Engine_t *engine
    uint32_t index
    uint32_t kind               # SLOT_*
    uint32_t critical           # inside a change of block states; fork waits for it to be 0
    uint32_t phase              # IDLE, BUSY, PLACING, TIMED_OUT in the low bits, the number of the run above
    uint32_t run                # that number; the owner's own
    uint32_t tid
    int cpu
    char *staging               # private page buffers, staging_bytes of them
    # the run in flight: written by the owner inside `critical`, read by the keeper and by a forked child
    uint64_t region_id
    Region_t *region            # held by the owner's reference for as long as since_ns is not 0
    uint64_t deadline_ns        # when the keeper may take the run away
    uint64_t first
    uint32_t count
    uint32_t cause
    uint32_t write
    uint32_t repair             # 1: pages of it may be there: fill aside, place page by page; 2: aside, placed nowhere
    uint32_t tries
    int32_t last_error
    uint64_t failed             # the first block of the run that failed for good
    uint64_t since_ns           # 0: nothing in flight
    uint64_t said_ns            # when the keeper last told the user about this fill
    uint32_t pending            # messages of the batch in hand that are not answered yet
    uint32_t nudged             # the keeper had the region's faults asked again, past this slow fill
    # the worker
    int epoll_fd
    int wake_fd
    uint32_t armed
    uint32_t sample
    uint32_t turns
    uint64_t last_id            # of the region that the last fault came from
    uint64_t served             # messages; read by others for placement, relaxed
    uint64_t empty              # wake-ups that found nothing
    uint64_t reviewed           # `served` at the last review of placement
    Job_t *job                    # whose piece the run is, or NULL
    Carrier *carrier            # of a slot that belongs to a request, else NULL
    const char *offered         # the run's bytes, which its provider offered unasked, or a migration brought; else NULL
    uint32_t huge               # those are a huge page, which may be moved to its place if the run is all of it
    uint64_t huge_moved         # so many bytes of it were
    uint32_t refused            # not to be taken: the block has others
    uint32_t no_room            # begin_run got nothing because the budget has no room
    uint32_t recycled           # the run's buffer: this many slots of the pool, from recycled_at on
    uint32_t recycled_at
    uint32_t torn               # evicting: pages that it was copying were dropped by the program,
    uint64_t torn_page[64]      # these; MAX_BLOCK_BYTES of the smallest pages
    uint64_t write_ns           # inside a call of a native store since then, for region_id and `first`; 0: not
    uint64_t write_limit_ns     # after so long it hangs
    uint64_t give_up_ns         # of one that waits for writes of others, whom nobody can tell to stop; 0: none
    uint64_t room_since_ns      # a touch waits for room since then; 0: none does
    void *packer                # who writes: its encoder, and the buffer of what it made; NULL before they are used
    char *packed
    uint8_t pad[64]

cdef struct Piece:              # some blocks to bring in, or one handed-off fault
    uint64_t region_id
    uint64_t first
    int64_t stride
    uint32_t count
    uint32_t write
    uint64_t since_ns
    int64_t ahead               # blocks from the piece to those that its source is told of; 0: none

cdef struct Cell:
    uint64_t turn
    Piece piece

cdef struct Ring:               # bounded, many producers, many consumers, no lock (after D. Vyukov's MPMC queue)
    Cell cell[RING]
    uint64_t head
    uint8_t pad0[56]
    uint64_t tail
    uint8_t pad1[56]

cdef struct Job_t:                # a prefetch or populate; all fields under the engine's job_lock but the last four
    Job_t *next
    uint64_t region_id
    uint32_t kind               # PREFETCH or POPULATE
    uint32_t refs               # the Python object, and the queue
    uint64_t *runs              # pairs: first, end
    uint64_t nruns
    uint64_t at                 # the run being handed out, and the block in it
    uint64_t block
    uint64_t handed_bytes
    uint32_t keeps              # a prefetch of more than what lately came and was not touched may have
    uint32_t outstanding
    uint32_t queued
    uint64_t since_ns
    uint32_t cancelled
    uint32_t done               # futex
    int32_t error
    uint32_t tries
    uint64_t error_block

cdef struct Note:               # blocks that came into memory, or back from the pool
    uint64_t turn
    uint64_t region_id
    uint64_t first
    uint32_t count
    uint32_t kind

cdef struct Notes:              # as Ring
    Note cell[NOTES]
    uint64_t head
    uint8_t pad0[56]
    uint64_t tail
    uint8_t pad1[56]

cdef struct Pool:               # slots for moved-out blocks of one size
    char *base                  # NULL until the first is moved out
    uint64_t slots
    uint64_t *taken             # bit per slot that has pages, or is about to
    uint64_t *full              # bit per slot whose pages nobody wants any more: buffers of the next fills
    uint64_t used               # words of the bitmaps that were ever used

cdef struct Recent:             # a block that came a moment ago: not to be evicted before its toucher has run
    uint64_t ref
    uint64_t since_ns

cdef struct Cgroup:             # the files that say what it may have and has
    char limit[256]
    char usage[256]
    char stat[256]

cdef struct Touch:              # the last faults of a thread; a heuristic
    uint32_t tid
    uint32_t at
    uint64_t page[4]

cdef struct Spill_t:            # where the dirty blocks of a private region go
    int file[EPOCHS]            # -1: not opened
    uint32_t held[EPOCHS]       # who reads or writes it now: it is not closed
    uint32_t epoch              # of the file that is written now; 0: none since the last fork
    uint32_t choosing           # somebody chooses the next
    uint32_t plain              # blocks that are stored without a try to compress them, and how many at the next time
    uint32_t plain_next
    char folder[256]

cdef struct Engine_t:
    Slot *slots
    uint32_t workers            # base workers, slots 0 .. workers-1
    uint64_t staging_bytes
    int faults_fd               # epoll over the uffds of all regions with thread delivery
    uint32_t stopping
    uint64_t inline_free        # bit per inline slot that is free
    uint32_t inline_turn        # futex: changes whenever an inline slot is given back
    uint64_t idle[2]            # bit per worker that sleeps and may be woken for work
    uint64_t stalled_ns         # since when all workers are busy; 0: not so. The keeper's own
    uint32_t busy               # workers inside a fill that may block
    uint32_t alive              # worker threads, without those that are stuck for ever; futex
    uint32_t keepers            # 1 while the keeper runs; futex
    Ring *demand                # faults that the SIGBUS handler hands to a worker
    Ring *ahead
    pthread_mutex_t job_lock
    Job_t *jobs
    uint32_t jobs_starved       # some wait for a request of a provider host to be free; no other can be served
    uint32_t jobs_waiting       # jobs with pieces to hand out, [populate] + [prefetch]
    int keeper_fd
    uint32_t keeper_alert
    bint waiting                # a touch has waited for long. The keeper's own
    uint32_t follow             # workers are armed by where faults come from
    uint32_t regions            # under registry_lock
    Region_t *dying             # closed, but still in somebody's hands: the keeper's list, under registry_lock
    uint64_t placed             # messages since the last review of placement
    uint32_t placing
    Hosts_t *hosts              # NULL until the first hosted provider
    Session_t *sessions         # under registry_lock
    Session_t *sessions_ended   # of which hosts are to hear yet; the same
    uint32_t carrier_waiters    # who waits for one
    uint32_t carrier_turn       # futex: changes whenever a request is free again
    uint32_t carriers           # their threads, and those of offers; futex
    uint32_t broken             # a forked child could not start its threads
    uint64_t read_errors
    # the budget
    uint64_t limit              # bytes; NO_LIMIT
    uint64_t asked_limit        # by the program; the keeper may hold `limit` below it
    uint32_t auto_limit         # "auto": it follows the machine
    uint64_t used               # bytes that regions and the pool have, or were promised
    uint64_t free_bytes         # of those, pages of the pool that nobody wants
    uint64_t pinned             # bytes of pinned blocks
    uint64_t block_max          # of its regions' block sizes, the largest
    uint32_t room_turn          # futex: changes whenever there may be room
    uint32_t room_waiters
    uint32_t bell               # futex: the evictor is to look
    uint32_t write_bell         # futex: the writer is to look
    uint32_t evictors           # threads: evictor, writers, flushes; futex
    uint32_t writer             # the slot of the background writer; an older one ends
    uint64_t full_wanted        # fills that asked for a recycled buffer; the evictor takes it down
    uint64_t residence_ns       # a block that came stays at least so long; adapts
    Notes *notes
    Ring *writes                # blocks for the writer
    pthread_mutex_t policy_lock
    policy pol
    policy_node *nodes
    uint32_t node_capacity
    Recent recent[RECENT]       # under policy_lock
    uint32_t recent_at
    Touch touch[TOUCHERS]
    Pool pool[CLASSES]
    int pool_fd                 # userfaultfd over the pools, -1 where pages are copied
    uint64_t pool_span          # address space of each pool
    uint32_t call_slots         # bit per slot of API calls in use
    uint32_t call_turn          # futex: changes whenever one is given back
    uint32_t wire_slots         # bit per slot of migrations in use
    uint32_t pressed            # eighths taken off the limit while the machine is short of memory
    uint64_t followed_ns        # when the keeper last looked at the machine's memory
    int cgroups                 # memory cgroups that hold us, from our own up
    Cgroup cgroup[CGROUPS]
    char pressure[256]          # the file of PSI, or ""
    Engine_t *next              # all engines, under registry_lock
    Counters *closed            # what regions that are gone had counted; under registry_lock

cdef uint64_t NO_LIMIT = <uint64_t>-1
cdef uint64_t SECOND_NS = 1000000000
cdef uint64_t SLICE_NS = 100000000          # of a wait that Python code waits for: then it looks at signals
cdef uint64_t PAGE = <uint64_t>sysconf(_SC_PAGESIZE)
cdef enum:
    RUN_BYTES = 512 * 1024      # of one fill: staging that stays in the second-level cache
    HUGE_BYTES = 2 << 20        # of a huge page, where pages have 4 KiB
    PIECE_BYTES = 512 * 1024    # of read-ahead and prefetch between two looks for demand
    TOLD_BYTES = 4 * 1024 * 1024  # how far before a piece its source is told, at the most
    MAX_BLOCK_BYTES = 16 << 20
    STAND_IN_MS = 50            # a stand-in is not woken for work, it looks; so its descriptors can go with it
    EVENT_WAKE = 1              # epoll data of a worker's own set
    EVENT_FAULTS = 2
