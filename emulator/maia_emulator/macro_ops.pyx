"""What a tile's engines do: one macro-operation at a time, on the tile's SRAM and the launch's arguments.

docs/contract.md, "Macro-operations", is the law. The verifier has bounded every operand; only host addresses, which may
be unmapped at any time, and GATHER's indices are looked at here.
"""

import ctypes

import numpy as np

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memmove

from maia_emulator.launch cimport kernel_t, launch_t, unit_t, worker_t
from maia_emulator.memory cimport DeviceMemory
from maia_emulator.support cimport clock_ns, copy_past_caches, pthread_rwlock_rdlock, pthread_rwlock_unlock
from maia_rt._fast.commands cimport (
    FAULT_NONE,
    FAULT_PROGRAM,
    MACRO_GATHER,
    MACRO_MATMUL,
    MACRO_MOVE,
    MACRO_SET,
    OP_FLAG_ACCUMULATE,
    OP_FLAG_SCALAR0_ARG,
    OP_FLAG_SCALAR1_ARG,
    OP_FLAG_TRANSPOSE_A,
    OP_FLAG_TRANSPOSE_B,
    OPERAND_A,
    OPERAND_B,
    OPERAND_C,
    OPERAND_DST,
    SPACE_ARG,
    SPACE_NONE,
    op_t,
    operand_t,
)

cdef enum:
    LOOK_AHEAD = 32         # operations

cdef extern from "conversions.h" nogil:
    void maia_conversion_tables()

cdef extern from "numerics.h" nogil:
    ctypedef struct maia_operand:
        char *data
        int64_t row_stride
        int64_t plane_stride
        int dtype
    void maia_set_sgemm(void *address, int ilp64)
    void maia_matmul(const maia_operand *dst, const maia_operand *a, const maia_operand *b, int64_t m, int64_t n,
                     int64_t k, int64_t batch, int transpose_a, int transpose_b, int accumulate, float alpha,
                     float *scratch)
    int maia_vector(int op, const maia_operand *dst, const maia_operand *a, const maia_operand *b,
                    const maia_operand *c, int64_t columns, int64_t rows, int64_t planes, float scalar0,
                    float scalar1, float *scratch)


def _use_blas():
    """Hand numpy's own BLAS to the tensor units, on one thread a call: tiles are what runs in parallel.

    The extension that numpy computes with is linked to a cblas; its dependencies answer for their symbols. Builds
    differ in prefix and suffix, and in the size of their integers (``64_``). Without any, a plain loop serves.
    """
    module = getattr(np, "_core", None) or np.core
    library = ctypes.CDLL(module._multiarray_umath.__file__)
    for prefix in ("scipy_", ""):
        for suffix in ("64_", ""):
            try:
                function = getattr(library, f"{prefix}cblas_sgemm{suffix}")
            except AttributeError:
                continue
            for setter in (f"{prefix}openblas_set_num_threads{suffix}", "MKL_Set_Num_Threads"):
                if hasattr(library, setter):
                    getattr(library, setter)(1)
            maia_set_sgemm(<void *> <uintptr_t> ctypes.cast(function, ctypes.c_void_p).value, suffix == "64_")
            return f"{prefix}cblas_sgemm{suffix}"
    return "plain loop"


maia_conversion_tables()
BLAS = _use_blas()
"""What multiplies matrices here."""


cdef uint32_t run_op(DeviceMemory memory, unit_t *unit, op_t *op, worker_t *worker, uint64_t *bad) noexcept nogil:
    cdef uint64_t begin = clock_ns()
    cdef uint32_t status = FAULT_NONE
    cdef int engine = 0
    if op.opcode == MACRO_MOVE:
        status = move(memory, unit, op, worker, bad)
    elif op.opcode == MACRO_GATHER:
        status = gather(memory, unit, op, worker, bad)
    elif op.opcode == MACRO_SET:
        status = fill(memory, unit, op, worker, bad)
    elif op.opcode == MACRO_MATMUL:
        engine = 1
        tensor(memory, unit, op, worker)
    else:
        engine = 2
        status = vector(memory, unit, op, worker)
    worker.busy[engine] += clock_ns() - begin
    return status


cdef uint32_t move(DeviceMemory memory, unit_t *unit, op_t *op, worker_t *worker, uint64_t *bad) noexcept nogil:
    cdef operand_t *dst = &op.operand[OPERAND_DST]
    cdef operand_t *src = &op.operand[OPERAND_A]
    cdef uint64_t row = op.n[0], rows = op.n[1], plane, _row, d, s
    cdef uint32_t status
    if dst.row_stride == row and src.row_stride == row:
        row, rows = row * rows, 1
    for plane in range(op.n[2]):
        d = dst.offset + plane * dst.plane_stride
        s = src.offset + plane * src.plane_stride
        for _row in range(rows):
            status = move_row(memory, unit, op, d, s, row, worker, bad)
            if status:
                return status
            d += dst.row_stride
            s += src.row_stride
    return FAULT_NONE


cdef uint32_t move_row(DeviceMemory memory, unit_t *unit, op_t *op, uint64_t dst, uint64_t src, uint64_t size,
                       worker_t *worker, uint64_t *bad) noexcept nogil:
    """Copy a run of bytes between two operands' offsets."""
    cdef launch_t *launch = unit.launch
    cdef char *to = locate(memory, unit, &op.operand[OPERAND_DST], dst)
    cdef char *origin = locate(memory, unit, &op.operand[OPERAND_A], src)
    cdef uint32_t status
    worker.traffic.past_caches = False
    if op.operand[OPERAND_DST].space == SPACE_ARG:
        worker.tile_out += size
        if launch.past_caches[op.operand[OPERAND_DST].index]:
            worker.traffic.past_caches = True
            worker.traffic.ahead = ahead_of(memory, unit, op, to if to != NULL else origin)
    else:
        worker.tile_in += size
    if to != NULL and origin != NULL:
        if worker.traffic.past_caches:
            copy_past_caches(to, origin, size, worker.traffic.ahead)
        else:
            memmove(to, origin, size)
        return FAULT_NONE
    pthread_rwlock_rdlock(&memory.dma.lock)
    status = memory.copy(address(memory, unit, &op.operand[OPERAND_DST], dst),
                         address(memory, unit, &op.operand[OPERAND_A], src), size, launch.context,
                         &worker.traffic, bad)
    pthread_rwlock_unlock(&memory.dma.lock)
    return status


cdef char *ahead_of(DeviceMemory memory, unit_t *unit, op_t *op, char *otherwise) noexcept nogil:
    """Where the tile reads from next; of several writes in a row the second one gets the second read, and so on."""
    cdef kernel_t *kernel = unit.launch.kernel
    cdef op_t *first = &kernel.ops[kernel.first[unit.logical * 3]]
    cdef op_t *end = first + kernel.length[unit.logical * 3]
    cdef op_t *at = op
    cdef operand_t *source
    cdef uint64_t size
    cdef char *found
    cdef int skip = 0
    while at > first and is_move(at - 1, True) and skip < LOOK_AHEAD:
        at -= 1
        skip += 1
    end = min(end, op + LOOK_AHEAD)
    at = op + 1
    while at < end:
        if is_move(at, False):
            if skip == 0:
                source = &at.operand[OPERAND_A]
                found = locate(memory, unit, source, source.offset)
                if found == NULL:
                    size = 1
                    pthread_rwlock_rdlock(&memory.dma.lock)
                    memory.resolve(address(memory, unit, source, source.offset), &size, False, unit.launch.context,
                                   &found)
                    pthread_rwlock_unlock(&memory.dma.lock)
                return found if found != NULL else otherwise
            skip -= 1
        at += 1
    return otherwise


cdef inline bint is_move(op_t *op, bint out) noexcept nogil:
    return op.opcode == MACRO_MOVE and (op.operand[OPERAND_DST].space == SPACE_ARG) == out


cdef uint32_t gather(DeviceMemory memory, unit_t *unit, op_t *op, worker_t *worker, uint64_t *bad) noexcept nogil:
    cdef operand_t *dst = &op.operand[OPERAND_DST]
    cdef operand_t *table = &op.operand[OPERAND_A]
    cdef int32_t *index = <int32_t *> locate(memory, unit, &op.operand[OPERAND_B],
                                             op.operand[OPERAND_B].offset)
    cdef uint32_t i, status
    cdef int32_t row
    for i in range(op.n[1]):
        row = index[i]
        if row < 0 or <uint32_t> row >= op.n[2]:
            bad[0] = <uint64_t> <int64_t> row
            return FAULT_PROGRAM
        status = move_row(memory, unit, op, dst.offset + <uint64_t> i * dst.row_stride,
                          table.offset + <uint64_t> row * table.row_stride, op.n[0], worker, bad)
        if status:
            return status
    return FAULT_NONE


cdef uint32_t fill(DeviceMemory memory, unit_t *unit, op_t *op, worker_t *worker, uint64_t *bad) noexcept nogil:
    cdef operand_t *dst = &op.operand[OPERAND_DST]
    cdef uint64_t plane, row, start, done, length
    cdef char pattern[256]
    cdef char *to
    cdef uint32_t i, status
    for i in range(64):
        memcpy(&pattern[4 * i], &op.scalar[0], 4)
    for plane in range(op.n[2]):
        for row in range(op.n[1]):
            start = dst.offset + plane * dst.plane_stride + row * dst.row_stride
            done = 0
            while done < op.n[0]:
                length = min(<uint64_t> 256, op.n[0] - done)
                to = locate(memory, unit, dst, start + done)
                if to != NULL:
                    memcpy(to, pattern, length)
                else:
                    pthread_rwlock_rdlock(&memory.dma.lock)
                    status = memory.store(address(memory, unit, dst, start + done), pattern, length,
                                          unit.launch.context, &worker.traffic, bad)
                    pthread_rwlock_unlock(&memory.dma.lock)
                    if status:
                        return status
                done += length
    return FAULT_NONE


cdef void tensor(DeviceMemory memory, unit_t *unit, op_t *op, worker_t *worker) noexcept nogil:
    cdef maia_operand dst, a, b
    cdef uint64_t m = op.n[0], n = op.n[1], k = op.n[2]
    describe(memory, unit, &op.operand[OPERAND_DST], &dst)
    describe(memory, unit, &op.operand[OPERAND_A], &a)
    describe(memory, unit, &op.operand[OPERAND_B], &b)
    maia_matmul(&dst, &a, &b, m, n, k, op.batch, (op.flags & OP_FLAG_TRANSPOSE_A) != 0,
                (op.flags & OP_FLAG_TRANSPOSE_B) != 0, (op.flags & OP_FLAG_ACCUMULATE) != 0,
                scalar(unit, op, 0, OP_FLAG_SCALAR0_ARG), worker.scratch)
    worker.macs += m * n * k * op.batch


cdef uint32_t vector(DeviceMemory memory, unit_t *unit, op_t *op, worker_t *worker) noexcept nogil:
    cdef maia_operand dst, a, b, c
    describe(memory, unit, &op.operand[OPERAND_DST], &dst)
    describe(memory, unit, &op.operand[OPERAND_A], &a)
    describe(memory, unit, &op.operand[OPERAND_B], &b)
    describe(memory, unit, &op.operand[OPERAND_C], &c)
    worker.vector_elements += <uint64_t> op.n[0] * op.n[1] * op.n[2]
    if maia_vector(op.opcode, &dst, &a, &b, &c, op.n[0], op.n[1], op.n[2],
                   scalar(unit, op, 0, OP_FLAG_SCALAR0_ARG), scalar(unit, op, 1, OP_FLAG_SCALAR1_ARG),
                   worker.scratch):
        return FAULT_PROGRAM
    return FAULT_NONE


cdef inline char *locate(DeviceMemory memory, unit_t *unit, operand_t *operand, uint64_t offset) noexcept nogil:
    """Where an offset of an operand lies, NULL where only the DMA table knows."""
    if operand.space == SPACE_ARG:
        if unit.launch.direct[operand.index] == NULL:
            return NULL
        return unit.launch.direct[operand.index] + offset
    return memory.tile_sram + <uint64_t> unit.physical * memory.tile_bytes + offset


cdef inline uint64_t address(DeviceMemory memory, unit_t *unit, operand_t *operand, uint64_t offset) noexcept nogil:
    """The device address of an offset of an operand."""
    if operand.space == SPACE_ARG:
        return unit.launch.args[operand.index] + offset
    return (<uint64_t> 3 << 48) + (<uint64_t> unit.physical << 32) + offset


cdef inline void describe(DeviceMemory memory, unit_t *unit, operand_t *operand, maia_operand *out) noexcept nogil:
    out.data = NULL if operand.space == SPACE_NONE else locate(memory, unit, operand, operand.offset)
    out.row_stride = operand.row_stride
    out.plane_stride = operand.plane_stride
    out.dtype = operand.dtype


cdef inline float scalar(unit_t *unit, op_t *op, int i, uint32_t from_argument) noexcept nogil:
    cdef float value
    cdef uint32_t bits = op.scalar[i]
    if op.flags & from_argument:
        bits = <uint32_t> unit.launch.args[op.scalar[i]]
    memcpy(&value, &bits, 4)
    return value
