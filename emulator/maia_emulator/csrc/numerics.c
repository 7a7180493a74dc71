#include "numerics.h"

#include <math.h>
#include <string.h>

#include "conversions.h"

enum {
    OP_ADD = 0x20, OP_SUB, OP_MUL, OP_SCALE, OP_CONVERT, OP_GELU, OP_RELU, OP_TANH, OP_EXP, OP_SOFTMAX, OP_LAYERNORM,
    OP_MEAN_ROWS, OP_L2_NORMALIZE
};

/* Functions of one value: own fits, within 2 units in the last place of the result ------------------------------ */

INLINE float exp_of(float x) {
    float y = x < -87.0f ? -87.0f : x > 88.7f ? 88.7f : x; /* NaN passes both comparisons as false */
    float n = (y * 1.44269504f + 0x1.8p23f) - 0x1.8p23f; /* round to nearest without SSE4's instruction */
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts: exact product, small rest */
    float p = 1.394858995e-03f;
    p = p * r + 8.375135274e-03f;
    p = p * r + 4.166621814e-02f;
    p = p * r + 1.666641540e-01f;
    p = p * r + 5.000000108e-01f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    float e = p * float_of((uint32_t)((int32_t)n + 127) << 23);
    e = x < -87.0f ? 0.0f : e; /* results below 2^-125 are flushed to zero */
    e = x > 88.7f ? INFINITY : e;
    return x != x ? x : e;
}

/* x * (1 + erf(x / sqrt 2)) / 2. The tail goes through erfc, so small results keep their relative precision. */
INLINE float gelu_of(float x) {
    float z = fabsf(x) * 0.70710678f, u = z * z;
    float p = 7.882497115e-05f;
    p = p * u + -8.018854994e-04f;
    p = p * u + 5.189311943e-03f;
    p = p * u + -2.685432880e-02f;
    p = p * u + 1.128359746e-01f;
    p = p * u + -3.761262690e-01f;
    p = p * u + 1.128379166e+00f;
    float near = 0.5f - 0.5f * z * p; /* erfc(z) / 2 for z <= 1 */
    float t = z > 4.5f ? 4.5f : z;
    float q = -1.376698464e-06f;
    q = q * t + 4.079091858e-05f;
    q = q * t + -5.514524155e-04f;
    q = q * t + 4.542896224e-03f;
    q = q * t + -2.579410283e-02f;
    q = q * t + 1.089572798e-01f;
    q = q * t + 6.330389537e-01f;
    q = q * t + 1.129511701e+00f;
    q = q * t + -1.391283284e-04f;
    float far = z > 4.5f ? 0.0f : 0.5f * exp_of(-q); /* erfc(4.5) is 2e-10: nothing beside 1 in binary32 */
    float tail = z <= 1.0f ? near : far;
    float below = tail == 0.0f ? -0.0f : x * tail; /* not infinity times zero */
    return x != x ? x : x < 0.0f ? below : x * (1.0f - tail);
}

INLINE float tanh_of(float x) {
    float u = x * x;
    float small = x * (1.0f + u * (-0.333333333f + u * (0.133333333f + u * -0.0539682540f)));
    float large = 1.0f - 2.0f / (exp_of(2.0f * x) + 1.0f);
    return fabsf(x) < 0.25f ? small : large;
}

/* Rows ---------------------------------------------------------------------------------------------------------- */

WIDE static void row_binary(int op, float *d, const float *a, const float *b, int64_t n) {
    if (op == OP_ADD)
        for (int64_t i = 0; i < n; i++) d[i] = a[i] + b[i];
    else if (op == OP_SUB)
        for (int64_t i = 0; i < n; i++) d[i] = a[i] - b[i];
    else
        for (int64_t i = 0; i < n; i++) d[i] = a[i] * b[i];
}

WIDE static void row_gelu(float *d, const float *a, int64_t n) {
    for (int64_t i = 0; i < n; i++) d[i] = gelu_of(a[i]);
}

WIDE static void row_exp(float *d, const float *a, int64_t n) {
    for (int64_t i = 0; i < n; i++) d[i] = exp_of(a[i]);
}

WIDE static void row_tanh(float *d, const float *a, int64_t n) {
    for (int64_t i = 0; i < n; i++) d[i] = tanh_of(a[i]);
}

WIDE static void row_relu(float *d, const float *a, int64_t n) {
    for (int64_t i = 0; i < n; i++) d[i] = a[i] < 0.0f ? 0.0f : a[i];
}

WIDE static void row_scale(float *d, const float *a, int64_t n, float s, float t) {
    for (int64_t i = 0; i < n; i++) d[i] = s * a[i] + t;
}

/* Dropped columns become minus infinity, which exp turns into an exact zero. */
WIDE static void row_softmax(float *d, const float *a, const float *keep, int64_t n, float scale) {
    float top = -INFINITY, sum = 0.0f;
    if (keep)
        for (int64_t i = 0; i < n; i++) d[i] = keep[i] != 0.0f ? scale * a[i] : -INFINITY;
    else
        for (int64_t i = 0; i < n; i++) d[i] = scale * a[i];
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; i++) top = d[i] > top ? d[i] : top;
    if (top == -INFINITY) { /* nothing kept, or nothing but minus infinity: a NaN goes on, all else is zero */
        for (int64_t i = 0; i < n; i++) d[i] = d[i] != d[i] ? d[i] : 0.0f;
        return;
    }
    for (int64_t i = 0; i < n; i++) d[i] = exp_of(d[i] - top);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += d[i];
    float inverse = 1.0f / sum;
    for (int64_t i = 0; i < n; i++) d[i] *= inverse;
}

WIDE static void row_layernorm(float *d, const float *a, const float *gamma, const float *beta, int64_t n, float eps) {
    float sum = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i];
    float mean = sum / (float)n;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < n; i++) square += (a[i] - mean) * (a[i] - mean);
    float inverse = 1.0f / sqrtf(square / (float)n + eps);
    for (int64_t i = 0; i < n; i++) d[i] = (a[i] - mean) * inverse * gamma[i] + beta[i];
}

WIDE static void row_l2(float *d, const float *a, int64_t n, float eps) {
    float square = 0.0f;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < n; i++) square += a[i] * a[i];
    float norm = sqrtf(square);
    float inverse = 1.0f / (norm > eps ? norm : eps);
    for (int64_t i = 0; i < n; i++) d[i] = a[i] * inverse;
}

WIDE static void row_accumulate(float *d, const float *a, int64_t n, float weight) {
    for (int64_t i = 0; i < n; i++) d[i] += weight * a[i];
}

/* A row as floats: where it lies for FP32, widened into scratch else. */
INLINE const float *load(const maia_operand *x, int64_t plane, int64_t row, int64_t n, float *scratch) {
    char *at = x->data + plane * x->plane_stride + row * x->row_stride;
    if (x->dtype == MAIA_FP32) return (const float *)at;
    maia_widen(scratch, at, n, x->dtype);
    return scratch;
}

static void mean_rows(const maia_operand *dst, const maia_operand *a, const maia_operand *b, int64_t columns,
                      int64_t rows, int64_t planes, float floor_, float *scratch) {
    float *sum = scratch, *wide = scratch + columns;
    for (int64_t p = 0; p < planes; p++) {
        float weight = 0.0f;
        memset(sum, 0, (size_t)columns * 4);
        for (int64_t r = 0; r < rows; r++) {
            maia_operand element = *b; /* the mask is one row of `rows` elements: element r as a row of one */
            element.row_stride = maia_row_bytes(b->dtype, 1);
            float keep_scratch, keep = *load(&element, p, r, 1, &keep_scratch);
            if (keep == 0.0f) continue; /* padding may hold anything, NaN too */
            weight += keep;
            row_accumulate(sum, load(a, p, r, columns, wide), columns, keep);
        }
        row_scale(sum, sum, columns, 1.0f / (weight > floor_ ? weight : floor_), 0.0f);
        maia_narrow(dst->data + p * dst->plane_stride, sum, columns, dst->dtype);
    }
}

/* Integers among themselves, exactly: a sum or product modulo 2^32, a conversion that saturates. False where the
 * operands are not that. */
static int integers(int op, const maia_operand *dst, const maia_operand *a, const maia_operand *b, int64_t columns,
                    int64_t rows, int64_t planes) {
    int from32 = a->dtype == MAIA_INT32, to32 = dst->dtype == MAIA_INT32;
    if (!from32 && a->dtype != MAIA_INT8) return 0;
    if (op != OP_ADD && op != OP_SUB && op != OP_MUL && (op != OP_CONVERT || (!to32 && dst->dtype != MAIA_INT8))) return 0;
    for (int64_t p = 0; p < planes; p++)
        for (int64_t r = 0; r < rows; r++) {
            char *out = dst->data + p * dst->plane_stride + r * dst->row_stride;
            const char *x = a->data + p * a->plane_stride + r * a->row_stride;
            if (op == OP_CONVERT) {
                for (int64_t i = 0; i < columns; i++) {
                    int32_t v = from32 ? ((const int32_t *)x)[i] : ((const int8_t *)x)[i];
                    if (to32)
                        ((int32_t *)out)[i] = v;
                    else
                        ((int8_t *)out)[i] = (int8_t)(v < -128 ? -128 : v > 127 ? 127 : v);
                }
                continue;
            }
            const uint32_t *u = (const uint32_t *)x;
            const uint32_t *v = (const uint32_t *)(b->data + p * b->plane_stride + r * b->row_stride);
            uint32_t *d = (uint32_t *)out;
            for (int64_t i = 0; i < columns; i++)
                d[i] = op == OP_ADD ? u[i] + v[i] : op == OP_SUB ? u[i] - v[i] : u[i] * v[i];
        }
    return 1;
}

int maia_vector(int op, const maia_operand *dst, const maia_operand *a, const maia_operand *b, const maia_operand *c,
                int64_t columns, int64_t rows, int64_t planes, float scalar0, float scalar1, float *scratch) {
    float *wide_a = scratch, *wide_b = scratch + columns, *wide_c = wide_b + columns, *wide_d = wide_c + columns;
    const float *gamma = NULL, *beta = NULL;
    if (op < OP_ADD || op > OP_L2_NORMALIZE) return -1;
    if (integers(op, dst, a, b, columns, rows, planes)) return 0;
    if (op == OP_MEAN_ROWS) {
        mean_rows(dst, a, b, columns, rows, planes, scalar0, scratch);
        return 0;
    }
    if (op == OP_LAYERNORM) {
        gamma = load(b, 0, 0, columns, wide_b);
        beta = load(c, 0, 0, columns, wide_c);
    }
    for (int64_t p = 0; p < planes; p++)
        for (int64_t r = 0; r < rows; r++) {
            char *out = dst->data + p * dst->plane_stride + r * dst->row_stride;
            float *d = dst->dtype == MAIA_FP32 ? (float *)out : wide_d;
            const float *x = load(a, p, r, columns, wide_a);
            switch (op) {
            case OP_ADD: case OP_SUB: case OP_MUL: row_binary(op, d, x, load(b, p, r, columns, wide_b), columns); break;
            case OP_SCALE: row_scale(d, x, columns, scalar0, scalar1); break;
            case OP_CONVERT: if (d != x) memmove(d, x, (size_t)columns * 4); break;
            case OP_GELU: row_gelu(d, x, columns); break;
            case OP_RELU: row_relu(d, x, columns); break;
            case OP_TANH: row_tanh(d, x, columns); break;
            case OP_EXP: row_exp(d, x, columns); break;
            case OP_SOFTMAX:
                row_softmax(d, x, b->data ? load(b, p, r, columns, wide_b) : NULL, columns, scalar0);
                break;
            case OP_LAYERNORM: row_layernorm(d, x, gamma, beta, columns, scalar0); break;
            default: row_l2(d, x, columns, scalar0); break;
            }
            if (d == wide_d) maia_narrow(out, wide_d, columns, dst->dtype);
        }
    return 0;
}

/* Tensor unit ---------------------------------------------------------------------------------------------------- */

typedef void (*sgemm32)(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *,
                        int);
typedef void (*sgemm64)(int, int, int, int64_t, int64_t, int64_t, float, const float *, int64_t, const float *,
                        int64_t, float, float *, int64_t);
static void *sgemm_address;
static int sgemm_ilp64;

void maia_set_sgemm(void *address, int ilp64) {
    sgemm_address = address;
    sgemm_ilp64 = ilp64;
}

WIDE static void gemm_row(float *restrict c, const float *restrict b, int64_t n, float value) {
    for (int64_t j = 0; j < n; j++) c[j] += value * b[j];
}

WIDE static float gemm_dot(const float *a, int64_t a_stride, const float *b, int64_t k) {
    float sum = 0.0f;
    if (a_stride == 1) {
#pragma omp simd reduction(+ : sum)
        for (int64_t l = 0; l < k; l++) sum += a[l] * b[l];
    } else {
        for (int64_t l = 0; l < k; l++) sum += a[l * a_stride] * b[l];
    }
    return sum;
}

static void gemm_plain(int ta, int tb, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
                       const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
    int64_t row = ta ? 1 : lda, step = ta ? lda : 1;
    for (int64_t i = 0; i < m; i++) {
        float *out = c + i * ldc;
        if (tb) {
            for (int64_t j = 0; j < n; j++) {
                float value = alpha * gemm_dot(a + i * row, step, b + j * ldb, k);
                out[j] = beta != 0.0f ? out[j] + value : value;
            }
            continue;
        }
        if (beta == 0.0f) memset(out, 0, (size_t)n * 4);
        for (int64_t l = 0; l < k; l++) gemm_row(out, b + l * ldb, n, alpha * a[i * row + l * step]);
    }
}

static void gemm(int ta, int tb, int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda,
                 const float *b, int64_t ldb, float beta, float *c, int64_t ldc) {
    enum { ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112 };
    int op_a = ta ? TRANSPOSED : PLAIN, op_b = tb ? TRANSPOSED : PLAIN;
    if (!sgemm_address)
        gemm_plain(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
    else if (sgemm_ilp64)
        ((sgemm64)sgemm_address)(ROW_MAJOR, op_a, op_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
    else
        ((sgemm32)sgemm_address)(ROW_MAJOR, op_a, op_b, (int)m, (int)n, (int)k, alpha, a, (int)lda, b, (int)ldb, beta,
                                 c, (int)ldc);
}

size_t maia_gemm_scratch(int64_t m, int64_t n, int64_t k) { return (size_t)(m * n + m * k + k * n); }

/* A matrix as floats with its leading dimension in elements. */
static const float *matrix(const maia_operand *x, int64_t plane, int64_t rows, int64_t columns, float *scratch,
                           int64_t *ld) {
    char *at = x->data + plane * x->plane_stride;
    if (x->dtype == MAIA_FP32) {
        *ld = rows > 1 ? x->row_stride / 4 : columns;
        return (const float *)at;
    }
    for (int64_t r = 0; r < rows; r++) maia_widen(scratch + r * columns, at + r * x->row_stride, columns, x->dtype);
    *ld = columns;
    return scratch;
}

/* INT8 times INT8 into INT32, modulo 2^32. A sum of up to 1024 products of 8-bit integers stays within 2^24, where
 * binary32 holds every integer: BLAS multiplies pieces of that depth exactly, in whatever order it sums. */
static void matmul_integers(const maia_operand *dst, const maia_operand *a, const maia_operand *b, int64_t m, int64_t n,
                            int64_t k, int64_t batch, int transpose_a, int transpose_b, int accumulate,
                            float *scratch) {
    enum { EXACT_DEPTH = 1024 };
    float *part = scratch, *wide_a = part + m * n, *wide_b = wide_a + m * k;
    for (int64_t p = 0; p < batch; p++) {
        int64_t lda, ldb;
        const float *pa = transpose_a ? matrix(a, p, k, m, wide_a, &lda) : matrix(a, p, m, k, wide_a, &lda);
        const float *pb = transpose_b ? matrix(b, p, n, k, wide_b, &ldb) : matrix(b, p, k, n, wide_b, &ldb);
        for (int64_t l = 0; l < k; l += EXACT_DEPTH) {
            int64_t depth = k - l < EXACT_DEPTH ? k - l : EXACT_DEPTH;
            gemm(transpose_a, transpose_b, m, n, depth, 1.0f, transpose_a ? pa + l * lda : pa + l, lda,
                 transpose_b ? pb + l : pb + l * ldb, ldb, 0.0f, part, n);
            for (int64_t r = 0; r < m; r++) {
                uint32_t *out = (uint32_t *)(dst->data + p * dst->plane_stride + r * dst->row_stride);
                for (int64_t j = 0; j < n; j++)
                    out[j] = (l || accumulate ? out[j] : 0) + (uint32_t)(int32_t)part[r * n + j];
            }
        }
    }
}

void maia_matmul(const maia_operand *dst, const maia_operand *a, const maia_operand *b, int64_t m, int64_t n,
                 int64_t k, int64_t batch, int transpose_a, int transpose_b, int accumulate, float alpha,
                 float *scratch) {
    if (dst->dtype == MAIA_INT32) {
        matmul_integers(dst, a, b, m, n, k, batch, transpose_a, transpose_b, accumulate, scratch);
        return;
    }
    float *wide_c = scratch, *wide_a = wide_c + m * n, *wide_b = wide_a + m * k;
    for (int64_t p = 0; p < batch; p++) {
        int64_t lda, ldb, ldc;
        const float *pa = transpose_a ? matrix(a, p, k, m, wide_a, &lda) : matrix(a, p, m, k, wide_a, &lda);
        const float *pb = transpose_b ? matrix(b, p, n, k, wide_b, &ldb) : matrix(b, p, k, n, wide_b, &ldb);
        char *out = dst->data + p * dst->plane_stride;
        float *pc = (float *)out;
        if (dst->dtype == MAIA_FP32) {
            ldc = m > 1 ? dst->row_stride / 4 : n;
        } else {
            pc = wide_c;
            ldc = n;
            if (accumulate)
                for (int64_t r = 0; r < m; r++) maia_widen(wide_c + r * n, out + r * dst->row_stride, n, dst->dtype);
        }
        gemm(transpose_a, transpose_b, m, n, k, alpha, pa, lda, pb, ldb, accumulate ? 1.0f : 0.0f, pc, ldc);
        if (pc == wide_c)
            for (int64_t r = 0; r < m; r++) maia_narrow(out + r * dst->row_stride, wide_c + r * n, n, dst->dtype);
    }
}
