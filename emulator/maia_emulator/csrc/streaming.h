/* Copies that leave the caches alone, for what is not read again soon. */
#ifndef MAIA_STREAMING_H
#define MAIA_STREAMING_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <immintrin.h>

#define STREAM_PAGE 4096
#define STREAM_PAGES (4 * STREAM_PAGE)

/* A line of 64 bytes, aligned where it is written. In parts, another thread of the core may have the first ones written
   to memory before the last is there; so at once where the processor can. */
__attribute__((target("avx512f")))
static inline void stream_line_at_once(char *to, const char *from)
{
    _mm512_stream_si512((__m512i *)to, _mm512_loadu_si512(from));
}

static inline void stream_line(char *to, const char *from)
{
    const __m128i *in = (const __m128i *)from;
    __m128i *out = (__m128i *)to;
    __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1);
    __m128i c = _mm_loadu_si128(in + 2), d = _mm_loadu_si128(in + 3);

    _mm_stream_si128(out, a);
    _mm_stream_si128(out + 1, b);
    _mm_stream_si128(out + 2, c);
    _mm_stream_si128(out + 3, d);
}

/* Lines one after the other; as many from `ahead` on come to the core meanwhile. Or without it four pages side by side:
   their addresses are translated, and their first lines fetched, at the same time. */
#define STREAM_LINES(line) \
    for (; ahead && size >= 64; to += 64, from += 64, ahead += 64, size -= 64) { \
        __builtin_prefetch(ahead, 0, 2); \
        line(to, from); \
    } \
    for (; size >= STREAM_PAGES; to += STREAM_PAGES, from += STREAM_PAGES, size -= STREAM_PAGES) \
        for (size_t at = 0; at < STREAM_PAGE; at += 64) { \
            line(to + at, from + at); \
            line(to + at + STREAM_PAGE, from + at + STREAM_PAGE); \
            line(to + at + 2 * STREAM_PAGE, from + at + 2 * STREAM_PAGE); \
            line(to + at + 3 * STREAM_PAGE, from + at + 3 * STREAM_PAGE); \
        } \
    memcpy(to, from, size);

__attribute__((target("avx512f")))
static void stream_at_once(char *to, const char *from, size_t size, const char *ahead)
{
    STREAM_LINES(stream_line_at_once)
}

static void stream(char *to, const char *from, size_t size, const char *ahead)
{
    STREAM_LINES(stream_line)
}

/* Meanwhile as many bytes from `ahead` on, which may be anywhere or nowhere (NULL), come to the core: reading and writing
   memory at the same time takes little longer than one of them. */
static inline void copy_past_caches(char *to, const char *from, size_t size, const char *ahead)
{
    size_t head = -(uintptr_t)to & 63;

    if (size < STREAM_PAGE) {
        memcpy(to, from, size);
        return;
    }
    memcpy(to, from, head);
    if (__builtin_cpu_supports("avx512f"))
        stream_at_once(to + head, from + head, size - head, ahead);
    else
        stream(to + head, from + head, size - head, ahead);
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
