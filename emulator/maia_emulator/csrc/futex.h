/* Futexes in shared memory (futex(2), futex_waitv(2)). */
#ifndef MAIA_FUTEX_H
#define MAIA_FUTEX_H

#include <errno.h>
#include <linux/futex.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Sleep while the word holds seen, for at most limit_ns (-1: no limit). */
static inline void futex_wait(uint32_t *word, uint32_t seen, int64_t limit_ns) {
    struct timespec t = {limit_ns / 1000000000, limit_ns % 1000000000};
    syscall(SYS_futex, word, FUTEX_WAIT, seen, limit_ns < 0 ? NULL : &t, NULL, 0);
}
static inline void futex_wake(uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0); }
static inline void futex_wake_one(uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0); }

/* The same for several words, at most 128; not 0 where the kernel (before 5.16) cannot. */
static inline int futex_wait_many(uint32_t **words, uint32_t *seen, int count, int64_t limit_ns) {
    enum { WAITV = 449, MOST = 128, WORD_32_BITS = 2 };
    struct { uint64_t value, address; uint32_t flags, reserved; } waiters[MOST];
    struct timespec until;
    for (int i = 0; i < count; i++) {
        waiters[i].value = seen[i];
        waiters[i].address = (uint64_t)(uintptr_t)words[i];
        waiters[i].flags = WORD_32_BITS;
        waiters[i].reserved = 0;
    }
    if (limit_ns >= 0) {
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_sec += (limit_ns + until.tv_nsec) / 1000000000;
        until.tv_nsec = (limit_ns + until.tv_nsec) % 1000000000;
    }
    return syscall(WAITV, waiters, count, 0, limit_ns < 0 ? NULL : &until, CLOCK_MONOTONIC) < 0 && errno == ENOSYS;
}
#endif
