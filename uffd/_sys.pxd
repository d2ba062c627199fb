# What the core sees of _sys.h and _sigbus.h. Declarations only; the meaning of each is said there.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "_sys.h" nogil:
    enum:
        UF_USER_MODE_ONLY
        UF_FEATURE_WP, UF_FEATURE_EVENT_FORK, UF_FEATURE_EVENT_REMAP, UF_FEATURE_EVENT_REMOVE
        UF_FEATURE_MISSING_HUGETLBFS, UF_FEATURE_MISSING_SHMEM, UF_FEATURE_EVENT_UNMAP, UF_FEATURE_SIGBUS
        UF_FEATURE_THREAD_ID, UF_FEATURE_MINOR_HUGETLBFS, UF_FEATURE_MINOR_SHMEM, UF_FEATURE_EXACT_ADDRESS
        UF_FEATURE_WP_HUGETLBFS_SHMEM, UF_FEATURE_WP_UNPOPULATED, UF_FEATURE_POISON, UF_FEATURE_WP_ASYNC
        UF_FEATURE_MOVE
        UF_REGISTER_MISSING, UF_REGISTER_WP, UF_REGISTER_MINOR
        UF_COPY_WP, UF_CONTINUE_WP, UF_WRITEPROTECT_WP, UF_MOVE_DONTWAKE
        UF_EVENT_PAGEFAULT, UF_EVENT_REMAP
        UF_FLAG_WRITE, UF_FLAG_WP, UF_FLAG_MINOR
        UF_WAY_DEVICE, UF_WAY_SYSCALL, UF_WAY_USER, UF_WAYS
    unsigned long UF_IOC_API, UF_IOC_REGISTER, UF_IOC_UNREGISTER, UF_IOC_WAKE, UF_IOC_COPY, UF_IOC_ZEROPAGE
    unsigned long UF_IOC_WRITEPROTECT, UF_IOC_CONTINUE, UF_IOC_POISON, UF_IOC_NEW, UF_IOC_MOVE

    ctypedef unsigned long pthread_t
    struct uf_msg:
        uint8_t event
        uint64_t flags
        uint64_t address
        uint32_t ptid

    uint32_t u32_load(const uint32_t *p) noexcept
    void u32_store(uint32_t *p, uint32_t v) noexcept
    uint32_t u32_swap(uint32_t *p, uint32_t v) noexcept
    uint32_t u32_add(uint32_t *p, uint32_t v) noexcept
    uint32_t u32_sub(uint32_t *p, uint32_t v) noexcept
    bint u32_cas(uint32_t *p, uint32_t old, uint32_t new) noexcept
    void u32_store_seq(uint32_t *p, uint32_t v) noexcept
    uint32_t u32_load_seq(const uint32_t *p) noexcept
    uint32_t u32_add_seq(uint32_t *p, uint32_t v) noexcept
    uint8_t u8_load(const uint8_t *p) noexcept
    void u8_store(uint8_t *p, uint8_t v) noexcept
    bint u8_cas(uint8_t *p, uint8_t old, uint8_t new) noexcept
    uint64_t u64_load(const uint64_t *p) noexcept
    void u64_store(uint64_t *p, uint64_t v) noexcept
    bint u64_cas(uint64_t *p, uint64_t old, uint64_t new) noexcept
    uint64_t u64_load_seq(const uint64_t *p) noexcept
    void fence_seq() noexcept
    uint64_t u64_add(uint64_t *p, uint64_t v) noexcept
    uint64_t u64_or(uint64_t *p, uint64_t v) noexcept
    uint64_t u64_and(uint64_t *p, uint64_t v) noexcept
    void *ptr_load(void *p) noexcept
    void ptr_store(void *p, void *v) noexcept
    void cpu_relax() noexcept
    int u64_log2(uint64_t v) noexcept
    int u64_count(uint64_t v) noexcept
    uint64_t now_ns() noexcept
    uint64_t real_ns() noexcept
    int getpid() noexcept
    void futex_wait(uint32_t *word, uint32_t value, uint64_t timeout_ns) noexcept
    void futex_wake_all(uint32_t *word) noexcept
    void nap(unsigned int tries) noexcept
    int thread_id() noexcept

    int uf_open(int way) noexcept
    int uf_api(int fd, uint64_t *features, uint64_t *ioctls) noexcept
    int uf_register(int fd, uint64_t start, uint64_t len, uint64_t mode, uint64_t *ioctls) noexcept
    enum:
        PM_WRITTEN, PM_PRESENT, PM_SWAPPED, PM_ZERO, PM_SCAN_PROTECT, PM_SCAN_CHECK
    struct pm_run:
        uint64_t start
        uint64_t end
        uint64_t categories
    struct pm_scan_request "pm_scan":
        uint64_t flags
        uint64_t start
        uint64_t end
        uint64_t walk_end
        uint64_t vec
        uint64_t vec_len
        uint64_t inverted
        uint64_t all_of
        uint64_t any_of
        uint64_t returned
    int pm_scan(int fd, pm_scan_request *s) noexcept
    int pm_open() noexcept
    int pm_unmarked(int fd, pm_scan_request *s, uint64_t page) noexcept
    int pm_marked(int fd, bint scans, uint64_t page, uint64_t start, uint64_t end) noexcept
    bint range_mapped(uint64_t start, uint64_t len) noexcept
    uint64_t uf_moved_bytes(const uf_msg *m) noexcept
    int uf_unregister(int fd, uint64_t start, uint64_t len) noexcept
    int uf_wake(int fd, uint64_t start, uint64_t len) noexcept
    int uf_copy(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, int64_t *done) noexcept
    int uf_zeropage(int fd, uint64_t start, uint64_t len, uint64_t mode, int64_t *done) noexcept
    int uf_continue(int fd, uint64_t start, uint64_t len, uint64_t mode, int64_t *done) noexcept
    int uf_poison(int fd, uint64_t start, uint64_t len, int64_t *done) noexcept
    int uf_move(int fd, uint64_t dst, uint64_t src, uint64_t len, uint64_t mode, int64_t *done) noexcept
    int uf_writeprotect(int fd, uint64_t start, uint64_t len, uint64_t mode) noexcept
    int uf_read(int fd, uf_msg *messages, int most) noexcept

    char *map_lazy(uint64_t len, int protection, int fd) noexcept
    char *map_aligned(uint64_t len, uint64_t unit, int protection) noexcept
    int map_forbid(char *start, uint64_t len) noexcept
    int map_unshare(char *start, uint64_t len) noexcept
    int file_write_out(int fd, const uint8_t *over) noexcept
    bint pages_there(const char *start, uint64_t len, uint64_t page) noexcept
    int copy_guarded(char *target, const char *source, uint64_t nbytes) noexcept
    uint64_t u64_min(uint64_t a, uint64_t b) noexcept
    uint64_t u64_max(uint64_t a, uint64_t b) noexcept
    uint64_t sys_memory_available() noexcept
    uint64_t sys_cgroup_room(const char *limit_path, const char *usage_path, const char *stat_path,
                             uint64_t used) noexcept
    unsigned int sys_pressure(const char *path) noexcept
    int64_t file_hole(int fd, int64_t start) noexcept
    int sys_unnamed_file(const char *folder) noexcept
    int sys_memfd(const char *name) noexcept
    int sys_eventfd() noexcept
    void eventfd_raise(int fd) noexcept
    void eventfd_clear(int fd) noexcept
    int epoll_watch(int epoll_fd, int fd, uint64_t data) noexcept
    int epoll_watch_edge(int epoll_fd, int fd, uint64_t data, bint again) noexcept
    int epoll_take(int epoll_fd, uint64_t *data, int most, int timeout_ms) noexcept
    int thread_cpu(uint32_t tid) noexcept
    int thread_start(pthread_t *thread, void *(*run)(void *) noexcept nogil, void *argument, const char *name,
                     int cpu) noexcept
    int cpus_allowed(int *cpus, int most) noexcept

    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes) noexcept
    int pthread_mutex_lock(pthread_mutex_t *mutex) noexcept
    int pthread_mutex_trylock(pthread_mutex_t *mutex) noexcept
    int pthread_mutex_unlock(pthread_mutex_t *mutex) noexcept
    void pthread_exit(void *result) noexcept
    int pthread_detach(pthread_t thread) noexcept
    int pthread_atfork(void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil,
                       void (*child)() noexcept nogil) noexcept

    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout_ms) noexcept
    int POLLIN
    int EPOLL_CTL_DEL, EPOLL_CLOEXEC
    int epoll_create1(int flags) noexcept
    int epoll_ctl(int epoll_fd, int operation, int fd, void *event) noexcept
    void *mmap(void *start, size_t len, int protection, int flags, int fd, int64_t offset) noexcept
    int munmap(void *start, size_t len) noexcept
    int madvise(void *start, size_t len, int advice) noexcept
    int mprotect(void *start, size_t len, int protection) noexcept
    int fallocate(int fd, int mode, int64_t offset, int64_t len) noexcept
    int fdatasync(int fd) noexcept
    int ftruncate(int fd, int64_t len) noexcept
    int close(int fd) noexcept
    int shutdown(int fd, int how) noexcept
    int SIGKILL, MAP_SHARED
    int64_t pread(int fd, void *block, size_t nbytes, int64_t offset) noexcept
    int posix_fadvise(int fd, int64_t offset, int64_t nbytes, int advice) noexcept
    enum: POSIX_FADV_WILLNEED
    int64_t pwrite(int fd, const void *block, size_t nbytes, int64_t offset) noexcept
    int64_t sysconf(int name) noexcept
    int sched_yield() noexcept
    void say(const char *text, size_t length) noexcept
    int PROT_NONE, PROT_READ, PROT_WRITE, MADV_DONTNEED, MAP_FIXED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE
    int FALLOC_FL_PUNCH_HOLE, FALLOC_FL_KEEP_SIZE, _SC_PAGESIZE, _SC_PHYS_PAGES, _SC_NPROCESSORS_ONLN
    void *MAP_FAILED
    int errno
    int EAGAIN, EEXIST, EINTR, EIO, ENODATA, ENOENT, ENOMEM, EFAULT, ETIMEDOUT, ENOSPC
    int ENOSYS, EINVAL, ENOTSUP, EBUSY, ECONNRESET, ECHILD, EPERM, ESTALE, ENOTTY, EBADMSG

cdef extern from "_sigbus.h" nogil:
    enum:
        BUS_NOT_OURS, BUS_SERVED, BUS_POISONED
    struct line:
        size_t n
        char text[1024]
    void line_text(line *l, const char *s) noexcept
    void line_number(line *l, uint64_t v) noexcept
    void line_errno(line *l, int e) noexcept
    void line_say(line *l) noexcept
    void bus_deliver_set(int (*deliver)(uint64_t address, int write) noexcept) noexcept
    int bus_ensure() noexcept
    void bus_die() noexcept
    void bus_after_fork() noexcept
    void int_arm() noexcept
    void int_disarm() noexcept
    void thread_take_int(int yes) noexcept

cdef extern from "_host.h" nogil:
    enum:
        HOST_REQUESTS, HOST_BUFFER_BYTES, HOST_TEXT_BYTES, HOST_VERSION
        REQ_FREE, REQ_POSTED, REQ_TAKEN, REQ_DONE, REQ_LOST, REQ_STATE, REQ_SEQUENCE
        REQ_OPEN, REQ_READ, REQ_WRITE, REQ_FLUSH
        OPENED_READ_MANY, OPENED_WRITES
        CONTROL_PICKLE, CONTROL_MEMORY, CONTROL_CLOSE
    struct host_request:
        uint32_t word
        uint32_t kind
        uint64_t session
        uint64_t offset
        uint64_t nbytes
        uint64_t order
        uint32_t urgent
        uint32_t in_place
        int32_t error
        uint32_t text_bytes
        int64_t opened_bytes
        uint32_t opened_concurrency
        uint32_t opened_flags
        uint64_t taken_ns
        char text[8192]
    struct host_offer:
        uint32_t word
        uint32_t taken
        uint64_t session
        uint64_t offset
        uint64_t step
        uint64_t row_bytes
        uint64_t rows
    struct host_channel:
        uint32_t version
        uint32_t ready
        uint32_t generation
        uint32_t doorbell
        uint32_t sleepers
        uint64_t posted
        uint64_t order
        uint64_t gap_ns
        uint64_t posted_ns
        host_offer offer
        host_request request[32]
    struct host_message:
        uint64_t session
        uint32_t what
        int32_t error
        uint64_t nbytes
        uint64_t block_bytes
        char name[80]
    struct host_start:
        char **argv
        char **envp
        int keep[2]
        bint with_terminal
    uint64_t host_buffer_at(uint32_t i) noexcept
    uint64_t host_channel_bytes() noexcept
    int host_send(int socket_fd, const host_message *m, int fd) noexcept
    int host_receive(int socket_fd, host_message *m, int *fd, int flags) noexcept
    int host_spawn(host_start *s) noexcept
    bint host_reap(int pid, int *status) noexcept
    void host_kill(int pid, int pidfd) noexcept
    int sys_pidfd(int pid) noexcept
    int pages_into(char *place, char *pages, uint64_t len) noexcept
    int host_sockets(int *pair) noexcept
    void futex_wait_shared(uint32_t *word, uint32_t value, uint64_t timeout_ns) noexcept
    void futex_wake_shared(uint32_t *word, int most) noexcept
    int SHUT_RDWR, MSG_DONTWAIT
    int getppid() noexcept
    void end_process "_exit"(int status) noexcept
