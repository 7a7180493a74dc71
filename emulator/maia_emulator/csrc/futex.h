/* Futexes in shared memory (futex(2)). */
#ifndef MAIA_FUTEX_H
#define MAIA_FUTEX_H

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
#endif
