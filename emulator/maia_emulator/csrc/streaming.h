/* A copy that leaves the caches alone, for what is not read again soon. Meanwhile as many bytes from `ahead` on, which may
   be anywhere, come to the core: reading and writing memory at the same time takes little longer than one of them. */
#ifndef MAIA_STREAMING_H
#define MAIA_STREAMING_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>

static inline void copy_past_caches(char *to, const char *from, size_t size, const char *ahead)
{
    size_t head = -(uintptr_t)to & 63;

    if (size < 4096) {
        memcpy(to, from, size);
        return;
    }
    memcpy(to, from, head);
    to += head, from += head, size -= head;
    for (; size >= 64; to += 64, from += 64, ahead += 64, size -= 64) {
        const __m128i *in = (const __m128i *)from;
        __m128i *out = (__m128i *)to;
        __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1);
        __m128i c = _mm_loadu_si128(in + 2), d = _mm_loadu_si128(in + 3);
        __builtin_prefetch(ahead, 0, 2);
        _mm_stream_si128(out, a);
        _mm_stream_si128(out + 1, b);
        _mm_stream_si128(out + 2, c);
        _mm_stream_si128(out + 3, d);
    }
    memcpy(to, from, size);
    _mm_sfence(); /* such stores are ordered by nothing else */
}
#else
static inline void copy_past_caches(char *to, const char *from, size_t size, const char *ahead)
{
    (void)ahead;
    memcpy(to, from, size);
}
#endif

#endif
