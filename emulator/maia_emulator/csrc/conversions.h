/* Rows of the contract's element types to binary32 and back (docs/contract.md, "Types"). */
#ifndef MAIA_CONVERSIONS_H
#define MAIA_CONVERSIONS_H

#include <stdint.h>
#include <string.h>

/* One build runs anywhere and takes the widest vectors of the machine at hand: the compiler makes a clone for each
 * target and the loader picks. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && !defined(__SANITIZE_ADDRESS__)
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDE
#endif
#define INLINE static inline __attribute__((always_inline))

/* As in maia_rt.contract.dtype.Dtype. */
enum {
    MAIA_FP32 = 1, MAIA_FP16, MAIA_BF16, MAIA_INT32, MAIA_UINT8, MAIA_INT8, MAIA_FP8_E4M3, MAIA_FP8_E5M2,
    MAIA_MXFP8_E4M3, MAIA_MXFP8_E5M2, MAIA_MXFP6_E2M3, MAIA_MXFP6_E3M2, MAIA_MXFP4_E2M1, MAIA_MXINT8
};

INLINE uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

/* Fill the tables that widening looks up; once, before anything else here. */
void maia_conversion_tables(void);

/* Bytes of a row of n elements; of an MX type, n is a multiple of 32 and its scales count. */
int64_t maia_row_bytes(int dtype, int64_t n);

void maia_widen(float *restrict dst, const char *restrict src, int64_t n, int dtype);
void maia_narrow(char *restrict dst, const float *restrict src, int64_t n, int dtype);

#endif
