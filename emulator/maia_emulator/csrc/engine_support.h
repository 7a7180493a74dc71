/* Atomics and the clock, as Cython can call them. */
#ifndef MAIA_ENGINE_SUPPORT_H
#define MAIA_ENGINE_SUPPORT_H

#include <sched.h>
#include <stdint.h>
#include <time.h>

static inline uint32_t load32(const volatile uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline uint64_t load64(const volatile uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void store32(volatile uint32_t *p, uint32_t x) { __atomic_store_n(p, x, __ATOMIC_RELEASE); }
static inline void store64(volatile uint64_t *p, uint64_t x) { __atomic_store_n(p, x, __ATOMIC_RELEASE); }
/* The sum. GCC 12.2 makes "lock xadd %edx, (mem); add %edx, %edx" of __atomic_add_fetch where x is not needed after it;
   what it cannot see through keeps the old value and x apart. */
static inline uint32_t add32(volatile uint32_t *p, uint32_t x) {
    uint32_t before = __atomic_fetch_add(p, x, __ATOMIC_ACQ_REL);
    __asm__("" : "+r"(before));
    return before + x;
}
static inline uint32_t or32(volatile uint32_t *p, uint32_t x) { return __atomic_fetch_or(p, x, __ATOMIC_ACQ_REL); }
static inline uint32_t and32(volatile uint32_t *p, uint32_t x) { return __atomic_fetch_and(p, x, __ATOMIC_ACQ_REL); }
static inline int swap_if32(volatile uint32_t *p, uint32_t from, uint32_t to) {
    return __atomic_compare_exchange_n(p, &from, to, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}
static inline int swap_if64(volatile uint64_t *p, uint64_t from, uint64_t to) {
    return __atomic_compare_exchange_n(p, &from, to, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}
static inline void prefetch(const void *p) { __builtin_prefetch(p); }
static inline void full_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void pause_cpu(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}
static inline uint64_t clock_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}
#endif
