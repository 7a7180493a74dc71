#include "conversions.h"

#include <math.h>

/* 16 bits ------------------------------------------------------------------------------------------------------- */

INLINE uint16_t to_bf16(float x) {
    uint32_t u = bits_of(x);
    uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (u & 0x7fffffff) > 0x7f800000 ? (uint16_t)((u >> 16) | 0x40) : (uint16_t)rounded;
}

/* binary16 by exponent scaling: subnormals come out of the multiply, infinities and NaN are patched. */
INLINE float from_fp16(uint16_t h) {
    uint32_t magnitude = (uint32_t)(h & 0x7fff) << 13;
    float scaled = float_of(magnitude) * 0x1p112f;
    uint32_t special = magnitude | 0x7f800000;
    uint32_t u = (h & 0x7c00) == 0x7c00 ? special : bits_of(scaled);
    return float_of(u | (uint32_t)(h & 0x8000) << 16);
}

INLINE uint16_t to_fp16(float x) {
    uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    /* Normal: rebias and round the 13 bits away. Subnormal: adding 0.5 leaves the rounded bits at the bottom. */
    uint32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    uint32_t tiny = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    uint32_t h = magnitude < (113u << 23) ? tiny : normal;
    h = magnitude >= 0x477ff000 ? 0x7c00 : h; /* 65520 and above round to infinity */
    h = magnitude > 0x7f800000 ? 0x7e00 | ((magnitude >> 13) & 0x3ff) : h;
    return (uint16_t)(sign | h);
}

/* Floats of 8 bits and less: 1 sign, the rest exponent and `fraction` bits; 2^least is the smallest normal number ----- */

typedef struct { int fraction, least; uint32_t largest; } small_float;

static const small_float E4M3 = {3, -6, 0x7e}, E5M2 = {2, -14, 0x7b}, E2M3 = {3, 0, 0x1f}, E3M2 = {2, -2, 0x1f},
                         E2M1 = {1, 0, 0x7};

/* The code of a magnitude, to nearest even, as if exponents went on without end. NaN and infinity come out larger than
 * any number's code. */
INLINE uint32_t code_of(uint32_t magnitude, small_float f) {
    int drop = 23 - f.fraction;
    uint32_t first = (uint32_t)(127 + f.least) << 23; /* the smallest normal number */
    uint32_t normal = ((magnitude + (1u << (drop - 1)) - 1 + ((magnitude >> drop) & 1)) >> drop) -
                      ((uint32_t)(126 + f.least) << f.fraction);
    /* Below it, adding a number whose last place is the format's leaves the rounded bits at the bottom. */
    float anchor = float_of((uint32_t)(127 + f.least + drop) << 23);
    uint32_t tiny = bits_of(float_of(magnitude) + anchor) - bits_of(anchor);
    return magnitude < first ? tiny : normal;
}

/* Numbers past the largest become the largest, infinity too. */
INLINE uint32_t saturated(uint32_t magnitude, small_float f) {
    uint32_t code = code_of(magnitude, f);
    return code > f.largest ? f.largest : code;
}

/* E4M3 has no infinity and saturates; NaN is 0x7f. */
INLINE uint8_t to_e4m3(float x) {
    uint32_t u = bits_of(x), magnitude = u & 0x7fffffff;
    return (uint8_t)((u >> 24 & 0x80) | (magnitude > 0x7f800000 ? 0x7f : saturated(magnitude, E4M3)));
}

/* E5M2 overflows to infinity as the IEEE types do. */
INLINE uint8_t to_e5m2(float x) {
    uint32_t u = bits_of(x), magnitude = u & 0x7fffffff, code = code_of(magnitude, E5M2);
    code = code > 0x7c ? 0x7c : code;
    return (uint8_t)((u >> 24 & 0x80) | (magnitude > 0x7f800000 ? 0x7e : code));
}

static float value_of(uint32_t code, int bits, small_float f) {
    uint32_t magnitude = code & ((1u << (bits - 1)) - 1);
    int exponent = (int)(magnitude >> f.fraction);
    uint32_t rest = magnitude & ((1u << f.fraction) - 1);
    if (exponent) rest |= 1u << f.fraction;
    float x = ldexpf((float)rest, (exponent ? exponent - 1 : 0) + f.least - f.fraction);
    return code >> (bits - 1) & 1 ? -x : x;
}

static float e4m3_values[256], e5m2_values[256], e2m3_values[64], e3m2_values[64], e2m1_values[16], int8_values[256];

void maia_conversion_tables(void) {
    for (uint32_t i = 0; i < 256; i++) {
        e4m3_values[i] = (i & 0x7f) == 0x7f ? NAN : value_of(i, 8, E4M3);
        e5m2_values[i] = (i & 0x7f) > 0x7c ? NAN : (i & 0x7f) == 0x7c ? INFINITY : value_of(i, 8, E5M2);
        if (i == 0xfc) e5m2_values[i] = -INFINITY;
        int8_values[i] = (float)(int8_t)i / 64.0f;
    }
    for (uint32_t i = 0; i < 64; i++) {
        e2m3_values[i] = value_of(i, 6, E2M3);
        e3m2_values[i] = value_of(i, 6, E3M2);
    }
    for (uint32_t i = 0; i < 16; i++) e2m1_values[i] = value_of(i, 4, E2M1);
}

/* Integers --------------------------------------------------------------------------------------------------------- */

/* To nearest even by the anchor's last place, which is 1. */
INLINE int8_t to_int8(float x) {
    float y = x < -128.0f ? -128.0f : x > 127.0f ? 127.0f : x;
    int32_t i = (int32_t)(bits_of(y + 0x1.8p23f) - bits_of(0x1.8p23f));
    return (int8_t)(x != x ? 0 : i);
}

INLINE int32_t to_int32(float x) {
    if (x != x) return 0;
    return x >= 0x1p31f ? INT32_MAX : x <= -0x1p31f ? INT32_MIN : (int32_t)rintf(x);
}

/* MX blocks (OCP Microscaling Formats v1.0) --------------------------------------------------------------------------- */

enum { BLOCK = 32 };

/* Bits an element, and the exponent of the largest number of the element type. */
INLINE int mx_bits(int dtype) {
    return dtype == MAIA_MXFP4_E2M1 ? 4 : dtype == MAIA_MXFP6_E2M3 || dtype == MAIA_MXFP6_E3M2 ? 6 : 8;
}

INLINE int mx_largest_exponent(int dtype) {
    switch (dtype) {
    case MAIA_MXFP8_E4M3: return 8;
    case MAIA_MXFP8_E5M2: return 15;
    case MAIA_MXFP6_E2M3: case MAIA_MXFP4_E2M1: return 2;
    case MAIA_MXFP6_E3M2: return 4;
    default: return 0; /* MXINT8: 1.984375 */
    }
}

/* 2^(scale - 127), also where that is subnormal (scale 0). */
INLINE float scale_of(uint32_t scale) {
    return float_of(scale == 0 ? 0x00400000 : scale == 255 ? 0x7fc00000 : scale << 23);
}

WIDE static void widen_block(float *restrict dst, const uint8_t *restrict src, const float *restrict values, int bits,
                             float scale) {
    if (bits == 8)
        for (int i = 0; i < BLOCK; i++) dst[i] = values[src[i]] * scale;
    else if (bits == 4)
        for (int i = 0; i < BLOCK / 2; i++) {
            dst[2 * i] = values[src[i] & 15] * scale;
            dst[2 * i + 1] = values[src[i] >> 4] * scale;
        }
    else
        for (int i = 0; i < BLOCK / 4; i++) {
            uint32_t four = src[3 * i] | (uint32_t)src[3 * i + 1] << 8 | (uint32_t)src[3 * i + 2] << 16;
            for (int j = 0; j < 4; j++) dst[4 * i + j] = values[four >> 6 * j & 63] * scale;
        }
}

static const float *mx_values(int dtype) {
    switch (dtype) {
    case MAIA_MXFP8_E4M3: return e4m3_values;
    case MAIA_MXFP8_E5M2: return e5m2_values;
    case MAIA_MXFP6_E2M3: return e2m3_values;
    case MAIA_MXFP6_E3M2: return e3m2_values;
    case MAIA_MXFP4_E2M1: return e2m1_values;
    default: return int8_values;
    }
}

static void widen_mx(float *restrict dst, const uint8_t *restrict src, int64_t n, int dtype) {
    const float *values = mx_values(dtype);
    int bits = mx_bits(dtype);
    const uint8_t *scales = src + n * bits / 8;
    for (int64_t block = 0; block < n / BLOCK; block++)
        widen_block(dst + block * BLOCK, src + block * (BLOCK * bits / 8), values, bits, scale_of(scales[block]));
}

INLINE void codes_of(uint8_t *restrict code, const float *restrict src, float inverse, int sign, small_float f) {
    for (int i = 0; i < BLOCK; i++) {
        uint32_t u = bits_of(src[i] * inverse);
        code[i] = (uint8_t)((u >> 31) << sign | saturated(u & 0x7fffffff, f));
    }
}

/* Section 6.3 of the specification: the scale is the largest power of two in the block over the largest power of two of
 * the element type, and what is past the element's largest number becomes that. A NaN or an infinity makes the scale,
 * and so the block, NaN; its elements are zero. */
WIDE static uint8_t narrow_block(uint8_t *restrict dst, const float *restrict src, int dtype) {
    uint8_t code[BLOCK];
    uint32_t most = 0;
    for (int i = 0; i < BLOCK; i++) {
        uint32_t magnitude = bits_of(src[i]) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    int bits = mx_bits(dtype), exponent = (int)(most >> 23), scale = exponent - mx_largest_exponent(dtype);
    scale = scale < 0 ? 0 : scale;
    if (exponent == 255) {
        memset(dst, 0, (size_t)(BLOCK * bits / 8));
        return 255;
    }
    float inverse = scale_of((uint32_t)(254 - scale));
    switch (dtype) {
    case MAIA_MXFP8_E4M3: codes_of(code, src, inverse, 7, E4M3); break;
    case MAIA_MXFP8_E5M2: codes_of(code, src, inverse, 7, E5M2); break;
    case MAIA_MXFP6_E2M3: codes_of(code, src, inverse, 5, E2M3); break;
    case MAIA_MXFP6_E3M2: codes_of(code, src, inverse, 5, E3M2); break;
    case MAIA_MXFP4_E2M1: codes_of(code, src, inverse, 3, E2M1); break;
    default:
        for (int i = 0; i < BLOCK; i++) {
            int8_t v = to_int8(src[i] * inverse * 64.0f);
            code[i] = (uint8_t)(v < -127 ? -127 : v); /* symmetric: -2 is not made */
        }
    }
    if (bits == 8)
        memcpy(dst, code, BLOCK);
    else if (bits == 4)
        for (int i = 0; i < BLOCK / 2; i++) dst[i] = (uint8_t)(code[2 * i] | code[2 * i + 1] << 4);
    else
        for (int i = 0; i < BLOCK / 4; i++) {
            const uint8_t *c = code + 4 * i;
            uint32_t four = c[0] | (uint32_t)c[1] << 6 | (uint32_t)c[2] << 12 | (uint32_t)c[3] << 18;
            for (int j = 0; j < 3; j++) dst[3 * i + j] = (uint8_t)(four >> 8 * j);
        }
    return (uint8_t)scale;
}

static void narrow_mx(uint8_t *restrict dst, const float *restrict src, int64_t n, int dtype) {
    int bytes = BLOCK * mx_bits(dtype) / 8;
    uint8_t *scales = dst + n / BLOCK * bytes;
    for (int64_t block = 0; block < n / BLOCK; block++)
        scales[block] = narrow_block(dst + block * bytes, src + block * BLOCK, dtype);
}

/* Rows ------------------------------------------------------------------------------------------------------------ */

int64_t maia_row_bytes(int dtype, int64_t n) {
    switch (dtype) {
    case MAIA_FP32: case MAIA_INT32: return 4 * n;
    case MAIA_FP16: case MAIA_BF16: return 2 * n;
    case MAIA_UINT8: case MAIA_INT8: case MAIA_FP8_E4M3: case MAIA_FP8_E5M2: return n;
    default: return n * mx_bits(dtype) / 8 + n / BLOCK;
    }
}

WIDE static void widen_16(float *restrict dst, const uint16_t *restrict h, int64_t n, int dtype) {
    if (dtype == MAIA_BF16)
        for (int64_t i = 0; i < n; i++) dst[i] = float_of((uint32_t)h[i] << 16);
    else
        for (int64_t i = 0; i < n; i++) dst[i] = from_fp16(h[i]);
}

WIDE static void widen_integers(float *restrict dst, const char *restrict src, int64_t n, int dtype) {
    if (dtype == MAIA_INT8)
        for (int64_t i = 0; i < n; i++) dst[i] = (float)((const int8_t *)src)[i];
    else
        for (int64_t i = 0; i < n; i++) dst[i] = (float)((const int32_t *)src)[i];
}

void maia_widen(float *restrict dst, const char *restrict src, int64_t n, int dtype) {
    const uint8_t *codes = (const uint8_t *)src;
    switch (dtype) {
    case MAIA_FP32: memcpy(dst, src, (size_t)n * 4); break;
    case MAIA_FP16: case MAIA_BF16: widen_16(dst, (const uint16_t *)src, n, dtype); break;
    case MAIA_INT8: case MAIA_INT32: widen_integers(dst, src, n, dtype); break;
    case MAIA_FP8_E4M3: for (int64_t i = 0; i < n; i++) dst[i] = e4m3_values[codes[i]]; break;
    case MAIA_FP8_E5M2: for (int64_t i = 0; i < n; i++) dst[i] = e5m2_values[codes[i]]; break;
    default: widen_mx(dst, codes, n, dtype); break;
    }
}

WIDE static void narrow_plain(char *restrict dst, const float *restrict src, int64_t n, int dtype) {
    uint16_t *restrict h = (uint16_t *)dst;
    if (dtype == MAIA_BF16)
        for (int64_t i = 0; i < n; i++) h[i] = to_bf16(src[i]);
    else if (dtype == MAIA_FP16)
        for (int64_t i = 0; i < n; i++) h[i] = to_fp16(src[i]);
    else if (dtype == MAIA_FP8_E4M3)
        for (int64_t i = 0; i < n; i++) dst[i] = (char)to_e4m3(src[i]);
    else if (dtype == MAIA_FP8_E5M2)
        for (int64_t i = 0; i < n; i++) dst[i] = (char)to_e5m2(src[i]);
    else if (dtype == MAIA_INT8)
        for (int64_t i = 0; i < n; i++) dst[i] = (char)to_int8(src[i]);
    else
        for (int64_t i = 0; i < n; i++) ((int32_t *)dst)[i] = to_int32(src[i]);
}

void maia_narrow(char *restrict dst, const float *restrict src, int64_t n, int dtype) {
    if (dtype == MAIA_FP32)
        memcpy(dst, src, (size_t)n * 4);
    else if (dtype >= MAIA_MXFP8_E4M3)
        narrow_mx((uint8_t *)dst, src, n, dtype);
    else
        narrow_plain(dst, src, n, dtype);
}
