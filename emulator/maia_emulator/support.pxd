"""Atomics, the clock and locks for code without the GIL."""

from libc.stdint cimport uint32_t, uint64_t

cdef extern from "engine_support.h" nogil:
    uint32_t load32(uint32_t *p)
    uint64_t load64(uint64_t *p)
    void store32(uint32_t *p, uint32_t x)
    void store64(uint64_t *p, uint64_t x)
    uint32_t add32(uint32_t *p, uint32_t x)
    uint32_t or32(uint32_t *p, uint32_t x)
    uint32_t and32(uint32_t *p, uint32_t x)
    bint swap_if32(uint32_t *p, uint32_t expected, uint32_t x)
    bint swap_if64(uint64_t *p, uint64_t expected, uint64_t x)
    void prefetch(const void *p)
    void full_fence()
    void pause_cpu()
    uint64_t clock_ns()
    int sched_yield()

cdef extern from "streaming.h" nogil:
    void copy_past_caches(char *to, const char *origin, size_t size, const char *ahead)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_rwlock_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_rwlock_rdlock(pthread_rwlock_t *lock)
    int pthread_rwlock_wrlock(pthread_rwlock_t *lock)
    int pthread_rwlock_unlock(pthread_rwlock_t *lock)
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_trylock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_cond_init(pthread_cond_t *condition, const void *attributes)
    int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)
    int pthread_cond_signal(pthread_cond_t *condition)
    int pthread_cond_broadcast(pthread_cond_t *condition)
    int pthread_cond_destroy(pthread_cond_t *condition)
