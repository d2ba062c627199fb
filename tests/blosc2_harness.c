/* uffd/_blosc2.h by itself: as a library for ctypes (b2_test_*), and as a program under sanitizers.
 *
 *   blosc2_harness LIBRARY flip FRAME STEP     change one byte of the frame after the other, and read it all
 *   blosc2_harness LIBRARY cut FRAME STEP      end the frame after each STEP bytes, before and after it is opened
 *   blosc2_harness LIBRARY time FRAME NBYTES   ns: chunks in a plain loop, the same through fills of NBYTES, one
 *                                              chunk, NBYTES at random
 *
 * Targets end at an unmapped page, so that a write or a read past them by the uninstrumented library dies too. The last
 * line of flip and cut says how often what came out.
 */
#define _GNU_SOURCE
#include "_blosc2.h"

#include <sys/mman.h>
#include <time.h>

int b2_test_load(const char *path) { return uffd_b2_load(path); }
const char *b2_test_version(void) { return uffd_b2_version(); }
size_t b2_test_info_bytes(void) { return sizeof(struct uffd_b2_info); }
void b2_test_close(void *self) { uffd_b2_close(self); }

int b2_test_open(void **out, const char *path, uint64_t offset, uint32_t slots, struct uffd_b2_info *info)
{
    return uffd_b2_open((struct uffd_b2 **)out, path, offset, slots, info);
}

int b2_test_fill(void *self, uint32_t slot, uint64_t offset, void *block, size_t nbytes)
{
    return uffd_b2_fill(self, slot, offset, block, nbytes);
}

static void check(bool right, const char *what)
{
    if (right)
        return;
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(2);
}

/* nbytes that end at the end of a mapping. */
static uint8_t *guarded(size_t nbytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), room = (nbytes + page - 1) / page * page;
    uint8_t *p = mmap(NULL, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(p != MAP_FAILED && !mprotect(p + room, page, PROT_NONE), "mmap");
    return p + room - nbytes;
}

struct file {
    uint8_t *bytes;
    size_t nbytes;
    int memfd;
    char path[64];
};

/* A file's bytes, and a memfd with the same. */
static struct file copy_of(const char *path)
{
    struct file it = {.memfd = memfd_create("frame", 0)};
    FILE *in = fopen(path, "rb");
    check(in && it.memfd >= 0 && !fseek(in, 0, SEEK_END), path);
    it.nbytes = (size_t)ftell(in);
    rewind(in);
    it.bytes = malloc(it.nbytes);
    check(it.bytes && fread(it.bytes, 1, it.nbytes, in) == it.nbytes, path);
    fclose(in);
    check(pwrite(it.memfd, it.bytes, it.nbytes, 0) == (ssize_t)it.nbytes, "pwrite");
    snprintf(it.path, sizeof it.path, "/proc/self/fd/%d", it.memfd);
    return it;
}

/* The threads of this process: fills start none, even where BLOSC_NTHREADS asks the library to. */
static long threads(void)
{
    struct stat st;
    check(!stat("/proc/self/task", &st), "/proc/self/task");
    return (long)st.st_nlink - 2;
}

enum { SAME, OTHER, OPEN_FAILED, FILL_FAILED, OUTCOMES };

/* Read an array that should be `right`, in pieces of several sizes, some in one slot, some in another. */
static int read_all(struct uffd_b2 *frame, const struct uffd_b2_info *info, const uint8_t *right, uint64_t right_bytes)
{
    const uint64_t sizes[] = {info->nbytes, 1000, 5000};
    int outcome = info->nbytes == right_bytes ? SAME : OTHER;
    for (uint32_t i = 0; i < 3; i++) {
        const uint64_t size = sizes[i] < 1 << 20 ? sizes[i] : 1 << 20;
        uint8_t *target = guarded(size);
        for (uint64_t at = 0; at < info->nbytes && at < 1 << 20; at += size) {
            const uint64_t n = size < info->nbytes - at ? size : info->nbytes - at;
            const int rc = uffd_b2_fill(frame, i & 1, at, target + size - n, n);
            check(rc <= 0, "a positive answer");
            if (rc)
                outcome = FILL_FAILED;
            else if (outcome == SAME && memcmp(target + size - n, right + at, n))
                outcome = OTHER;
        }
        const size_t page = (size_t)sysconf(_SC_PAGESIZE), room = (size + page - 1) / page * page;
        munmap(target + size - room, room + page);
    }
    check(threads() == 1, "fills started threads");
    return outcome;
}

static int try_frame(const struct file *file, const uint8_t *right, uint64_t right_bytes)
{
    struct uffd_b2_info info;
    struct uffd_b2 *frame;
    if (uffd_b2_open(&frame, file->path, 0, 2, &info))
        return OPEN_FAILED;
    int outcome = read_all(frame, &info, right, right_bytes);
    uffd_b2_close(frame);
    return outcome;
}

static uint8_t *right_bytes_of(const struct file *file, uint64_t *nbytes)
{
    struct uffd_b2_info info;
    struct uffd_b2 *frame;
    check(!uffd_b2_open(&frame, file->path, 0, 2, &info), "the frame itself does not open");
    uint8_t *right = malloc(info.nbytes);
    check(right && !uffd_b2_fill(frame, 0, 0, right, info.nbytes), "the frame itself does not read");
    uffd_b2_close(frame);
    *nbytes = info.nbytes;
    return right;
}

static void flip(const char *path, size_t step)
{
    static const uint8_t masks[] = {0x01, 0x80, 0xff};
    struct file file = copy_of(path);
    uint64_t nbytes, count[OUTCOMES] = {0};
    uint8_t *right = right_bytes_of(&file, &nbytes);
    for (size_t at = 0; at < file.nbytes; at += step) {
        for (size_t m = 0; m < sizeof masks; m++) {
            const uint8_t changed = file.bytes[at] ^ masks[m];
            check(pwrite(file.memfd, &changed, 1, (off_t)at) == 1, "pwrite");
            count[try_frame(&file, right, nbytes)]++;
        }
        check(pwrite(file.memfd, file.bytes + at, 1, (off_t)at) == 1, "pwrite");
    }
    printf("same %lu other %lu open-failed %lu fill-failed %lu\n", count[SAME], count[OTHER], count[OPEN_FAILED],
           count[FILL_FAILED]);
    free(right);
    free(file.bytes);
}

static void cut(const char *path, size_t step)
{
    struct file file = copy_of(path);
    uint64_t nbytes, count[OUTCOMES] = {0};
    uint8_t *right = right_bytes_of(&file, &nbytes);
    for (size_t keep = 0; keep < file.nbytes; keep += step) {
        struct uffd_b2_info info;
        struct uffd_b2 *frame;
        check(!uffd_b2_open(&frame, file.path, 0, 2, &info), "open");
        check(!ftruncate(file.memfd, (off_t)keep), "ftruncate");
        const int late = read_all(frame, &info, right, nbytes);
        uffd_b2_close(frame);
        count[late]++;
        count[try_frame(&file, right, nbytes)]++;
        check(pwrite(file.memfd, file.bytes, file.nbytes, 0) == (ssize_t)file.nbytes, "pwrite");
    }
    printf("same %lu other %lu open-failed %lu fill-failed %lu\n", count[SAME], count[OTHER], count[OPEN_FAILED],
           count[FILL_FAILED]);
    free(right);
    free(file.bytes);
}

static double now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

/* What there is to compare with: all chunks read and decoded by one context, nothing else. */
static void plain_loop(struct uffd_b2 *frame, uint64_t chunks, uint8_t *target)
{
    void *context = b2_context(NULL);
    uint8_t *packed = malloc(frame->frame.stored_bytes + B2_CHUNK_HEADER_BYTES);
    for (uint64_t i = 0; i < chunks; i++) {
        const struct b2_place place = frame->frame.places[i];
        const uint64_t nbytes = b2_chunk_nbytes(&frame->frame, i);
        check(!b2_pread(frame->frame.fd, packed, place.span, frame->frame.chunks_start + (uint64_t)place.at), "pread");
        int n = b2_library.decompress_ctx(context, packed, (int32_t)place.span, target + i * frame->frame.stored_bytes,
                                          (int32_t)nbytes);
        check(n == (int)nbytes, "decompress");
    }
    free(packed);
    b2_library.free_ctx(context);
}

/* Fills of nbytes each, at multiples of nbytes, in order or picked by a linear congruence. */
static void fills(struct uffd_b2 *frame, const struct uffd_b2_info *info, uint64_t count, uint64_t nbytes, bool random,
                  uint8_t *target)
{
    static uint64_t state = 88172645463325252u;
    const uint64_t places = info->nbytes / nbytes;
    for (uint64_t i = 0; i < count; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        const uint64_t at = (random ? (state >> 33) % places : i) * nbytes;
        check(!uffd_b2_fill(frame, 0, at, target + at, nbytes), "fill");
    }
}

static void times(const char *path, uint64_t nbytes)
{
    enum { PLAIN, FILLS, CHUNK, RANDOM, KINDS, ROUNDS = 9 };
    double best[KINDS] = {1e18, 1e18, 1e18, 1e18};
    struct uffd_b2_info info;
    struct uffd_b2 *frame;
    check(!uffd_b2_open(&frame, path, 0, 1, &info), path);
    uint8_t *target = malloc(info.nbytes);
    memset(target, 1, info.nbytes);
    const uint64_t chunks = info.nbytes / info.chunk_bytes, count = chunks * info.chunk_bytes / nbytes;
    for (int round = 0; round < ROUNDS; round++) {
        double t[KINDS + 1];
        t[0] = now_ns();
        plain_loop(frame, chunks, target);
        t[1] = now_ns();
        fills(frame, &info, count, nbytes, false, target);
        t[2] = now_ns();
        fills(frame, &info, chunks, info.chunk_bytes, true, target);
        t[3] = now_ns();
        fills(frame, &info, count, nbytes, true, target);
        t[4] = now_ns();
        for (int k = 0; k < KINDS; k++)
            best[k] = t[k + 1] - t[k] < best[k] ? t[k + 1] - t[k] : best[k];
    }
    printf("%.0f %.0f %.0f %.0f\n", best[PLAIN], best[FILLS], best[CHUNK] / (double)chunks,
           best[RANDOM] / (double)count);
    free(target);
    uffd_b2_close(frame);
}

int main(int argc, char **argv)
{
    check(argc == 5, "usage: blosc2_harness LIBRARY flip|cut|time FRAME NUMBER");
    check(!uffd_b2_load(argv[1]), argv[1]);
    const unsigned long number = strtoul(argv[4], NULL, 10);
    if (!strcmp(argv[2], "flip"))
        flip(argv[3], number);
    else if (!strcmp(argv[2], "cut"))
        cut(argv[3], number);
    else
        times(argv[3], number);
    return 0;
}
