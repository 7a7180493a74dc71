/* The arithmetic of the emulated tensor and vector units (docs/contract.md, "Macro-operations").
 *
 * Everything with a fraction computes in binary32: operands are widened on the way in and rounded on the way out, see
 * conversions.h. Integers among themselves are exact. No function here touches Python or takes a lock: engine threads call them without the GIL.
 */
#ifndef MAIA_NUMERICS_H
#define MAIA_NUMERICS_H

#include <stddef.h>
#include <stdint.h>

/* One operand of a vector or tensor operation: rows of elements of dtype, strides in bytes. */
typedef struct {
    char *data;
    int64_t row_stride, plane_stride;
    int dtype;
} maia_operand;

/* sgemm by address: cblas with 32-bit or, where ilp64, 64-bit sizes; NULL uses a plain loop. */
void maia_set_sgemm(void *address, int ilp64);

/* dst[p] = alpha * op(a[p]) op(b[p]) (+ dst[p]); scratch holds at least maia_gemm_scratch() floats. */
void maia_matmul(const maia_operand *dst, const maia_operand *a, const maia_operand *b, int64_t m, int64_t n,
                 int64_t k, int64_t batch, int transpose_a, int transpose_b, int accumulate, float alpha,
                 float *scratch);
size_t maia_gemm_scratch(int64_t m, int64_t n, int64_t k);

/* A vector macro-operation by its contract number; scratch holds at least 4 * columns floats. Returns 0, or -1 for a
 * number it does not know. */
int maia_vector(int op, const maia_operand *dst, const maia_operand *a, const maia_operand *b, const maia_operand *c,
                int64_t columns, int64_t rows, int64_t planes, float scalar0, float scalar1, float *scratch);

#endif
