"""Loads, stores and fences for memory shared with a device. The only place that knows the processor.

The device writes each word on its own, so a word is read once, with acquire, and believed; what we publish is stored
with release. BARs get plain stores only: a locked instruction would go over the bus as a locked read.
"""

from libc.stdint cimport uint32_t, uint64_t


cdef extern from *:
    """
    #include <stdint.h>
    #include <time.h>

    static inline uint32_t maia_load32(const void *p) {
        return __atomic_load_n((const uint32_t *)p, __ATOMIC_ACQUIRE);
    }
    static inline uint64_t maia_load64(const void *p) {
        return __atomic_load_n((const uint64_t *)p, __ATOMIC_ACQUIRE);
    }
    static inline void maia_store32(void *p, uint32_t v) {
        __atomic_store_n((uint32_t *)p, v, __ATOMIC_RELEASE);
    }
    static inline void maia_store64(void *p, uint64_t v) {
        __atomic_store_n((uint64_t *)p, v, __ATOMIC_RELEASE);
    }
    /* Earlier stores are visible before later loads. A locked instruction on our own stack is cheaper than mfence. */
    static inline void maia_fence(void) {
    #if defined(__x86_64__)
        uint32_t own = 0;
        __asm__ __volatile__("lock; addl $0, %0" : "+m"(own) : : "memory", "cc");
    #else
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
    #endif
    }
    static inline void maia_pause(void) {
    #if defined(__x86_64__)
        __builtin_ia32_pause();
    #elif defined(__aarch64__)
        __asm__ __volatile__("isb" ::: "memory");
    #endif
    }
    static inline void maia_prefetch_for_write(const void *p) {
        __builtin_prefetch(p, 1);
    }
    static inline int64_t maia_now_ns(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    }
    """
    uint32_t load32 "maia_load32"(const void *address) noexcept nogil
    uint64_t load64 "maia_load64"(const void *address) noexcept nogil
    void store32 "maia_store32"(void *address, uint32_t value) noexcept nogil
    void store64 "maia_store64"(void *address, uint64_t value) noexcept nogil
    void fence "maia_fence"() noexcept nogil
    void pause "maia_pause"() noexcept nogil
    void prefetch_for_write "maia_prefetch_for_write"(const void *address) noexcept nogil
    long long now_ns "maia_now_ns"() noexcept nogil
