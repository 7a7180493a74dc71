# cython: language_level=3, boundscheck=False, wraparound=False, binding=False
"""DLPack capsules, written and read: the exchange of tensors between libraries without a copy.

The structures are those of dlpack.h, version 1.0 (https://dmlc.github.io/dlpack/latest/c_api.html), and of the
versions before it, which know no flags. A capsule that nobody took frees its tensor; one that was taken is renamed.
"""

from cpython.buffer cimport Py_buffer, PyBuffer_FillInfo
from cpython.pycapsule cimport (
    PyCapsule_GetName, PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New, PyCapsule_SetName,
)
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

cdef struct DLDevice:
    int32_t device_type
    int32_t device_id

cdef struct DLDataType:
    uint8_t code
    uint8_t bits
    uint16_t lanes

cdef struct DLTensor:
    void *data
    DLDevice device
    int32_t ndim
    DLDataType dtype
    int64_t *shape
    int64_t *strides
    uint64_t byte_offset

cdef struct DLManagedTensor:
    DLTensor tensor
    void *context
    void (*deleter)(DLManagedTensor *) noexcept

cdef struct DLPackVersion:
    uint32_t major
    uint32_t minor

cdef struct DLManagedTensorVersioned:
    DLPackVersion version
    void *context
    void (*deleter)(DLManagedTensorVersioned *) noexcept
    uint64_t flags
    DLTensor tensor

cdef enum:
    FLAG_READ_ONLY = 1
    FLAG_IS_COPIED = 2
    MAX_DIMENSIONS = 64

cdef const char *OLD = "dltensor"
cdef const char *OLD_USED = "used_dltensor"
cdef const char *VERSIONED = "dltensor_versioned"
cdef const char *VERSIONED_USED = "used_dltensor_versioned"


def export_tensor(owner, uint64_t address, tuple dtype not None, tuple shape not None, tuple strides not None,
                  tuple device not None, *, bint readonly=False, bint copied=False, bint versioned=True):
    """Return a capsule.

    Parameters
    ----------
    owner : object
        Kept until the consumer lets go: it keeps the memory.
    address : int
        Of the first element.
    dtype : (code, bits)
        As in dlpack.h.
    shape, strides : tuple of int
        In elements.
    device : (type, id)
    readonly, copied : bool
        Flags of the versioned structure.
    versioned : bool
        Whether the consumer knows DLPack 1.0; a tensor that is read-only needs that.
    """
    cdef Py_ssize_t count = len(shape)
    if count > MAX_DIMENSIONS or len(strides) != count:
        raise BufferError(f"{count} dimensions with {len(strides)} strides cannot be exported")
    cdef DLManagedTensorVersioned *new = NULL
    cdef DLManagedTensor *old = NULL
    cdef DLTensor *tensor
    cdef int64_t *numbers = <int64_t *>malloc(max(2 * count, 1) * sizeof(int64_t))
    if numbers == NULL:
        raise MemoryError
    try:
        for i in range(count):
            numbers[i] = shape[i]
            numbers[count + i] = strides[i]
        if versioned:
            new = <DLManagedTensorVersioned *>malloc(sizeof(DLManagedTensorVersioned))
            if new == NULL:
                raise MemoryError
            new.version = DLPackVersion(1, 0)
            new.context = <void *>owner
            new.deleter = delete_versioned
            new.flags = (FLAG_READ_ONLY if readonly else 0) | (FLAG_IS_COPIED if copied else 0)
            tensor = &new.tensor
        else:
            old = <DLManagedTensor *>malloc(sizeof(DLManagedTensor))
            if old == NULL:
                raise MemoryError
            old.context = <void *>owner
            old.deleter = delete_old
            tensor = &old.tensor
        tensor.data = <void *>address
        tensor.device = DLDevice(device[0], device[1])
        tensor.ndim = <int32_t>count
        tensor.dtype = DLDataType(dtype[0], dtype[1], 1)
        tensor.shape = numbers
        tensor.strides = numbers + count
        tensor.byte_offset = 0
        if versioned:
            capsule = PyCapsule_New(new, VERSIONED, discard)
        else:
            capsule = PyCapsule_New(old, OLD, discard)
    except BaseException:
        free(numbers)
        free(new)
        free(old)
        raise
    Py_INCREF(owner)
    return capsule


cdef class ImportedTensor:
    """A tensor taken out of a capsule, which is used up by that. Its buffer is the bytes that it spans.

    Attributes
    ----------
    address : int
        Of its first element.
    start : int
        The lowest address that it spans: where its buffer begins.
    shape : tuple of int
    strides : tuple of int
        In elements.
    dtype : (code, bits, lanes)
    device : (type, id)
    readonly : bool

    Raises
    ------
    BufferError
        It is no capsule of DLPack, was taken before, or is of a version that is not known.
    """

    cdef DLManagedTensor *old
    cdef DLManagedTensorVersioned *new
    cdef readonly uint64_t address
    cdef readonly uint64_t start
    cdef readonly tuple shape
    cdef readonly tuple strides
    cdef readonly tuple dtype
    cdef readonly tuple device
    cdef readonly bint readonly
    cdef Py_ssize_t span

    def __cinit__(self, capsule):
        cdef DLTensor *tensor
        cdef const char *used
        if PyCapsule_IsValid(capsule, VERSIONED):
            new = <DLManagedTensorVersioned *>PyCapsule_GetPointer(capsule, VERSIONED)
            if new.version.major != 1:
                raise BufferError(f"DLPack {new.version.major}.{new.version.minor} is not known, 1.x is")
            tensor, used = &new.tensor, VERSIONED_USED
            readonly = new.flags & FLAG_READ_ONLY
        elif PyCapsule_IsValid(capsule, OLD):
            tensor, used = &(<DLManagedTensor *>PyCapsule_GetPointer(capsule, OLD)).tensor, OLD_USED
            readonly = False
        else:
            raise BufferError("__dlpack__ returned no capsule of DLPack, or one that was used before")
        if not 0 <= tensor.ndim <= MAX_DIMENSIONS or (tensor.ndim and tensor.shape == NULL):
            raise BufferError(f"a tensor of {tensor.ndim} dimensions cannot be imported")
        shape = tuple([tensor.shape[i] for i in range(tensor.ndim)])
        if min(shape, default=0) < 0:
            raise BufferError(f"a tensor of shape {shape} cannot be imported")
        if tensor.strides != NULL:
            strides = tuple([tensor.strides[i] for i in range(tensor.ndim)])
        else:
            strides, step = (), 1
            for extent in reversed(shape):
                strides = (step, *strides)
                step *= extent
        size = (tensor.dtype.bits * tensor.dtype.lanes + 7) // 8
        below = above = 0
        if 0 not in shape:
            for extent, stride in zip(shape, strides):
                if stride < 0:
                    below -= stride * (extent - 1) * size
                else:
                    above += stride * (extent - 1) * size
            above += size
        # From here on nothing fails: the tensor is ours, and its capsule used up.
        self.shape, self.strides, self.readonly = shape, strides, bool(readonly)
        self.dtype = (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes)
        self.device = (tensor.device.device_type, tensor.device.device_id)
        self.address = <uint64_t>tensor.data + tensor.byte_offset
        self.start = self.address - <uint64_t>below
        self.span = below + above
        if used == VERSIONED_USED:
            self.new = <DLManagedTensorVersioned *>PyCapsule_GetPointer(capsule, VERSIONED)
        else:
            self.old = <DLManagedTensor *>PyCapsule_GetPointer(capsule, OLD)
        PyCapsule_SetName(capsule, used)

    def __dealloc__(self):
        if self.new != NULL and self.new.deleter != NULL:
            self.new.deleter(self.new)
        if self.old != NULL and self.old.deleter != NULL:
            self.old.deleter(self.old)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, <void *>self.start, self.span, self.readonly, flags)


cdef void delete_versioned(DLManagedTensorVersioned *managed) noexcept with gil:
    Py_DECREF(<object>managed.context)
    free(managed.tensor.shape)
    free(managed)


cdef void delete_old(DLManagedTensor *managed) noexcept with gil:
    Py_DECREF(<object>managed.context)
    free(managed.tensor.shape)
    free(managed)


cdef void discard(object capsule) noexcept:
    cdef const char *name = PyCapsule_GetName(capsule)
    cdef DLManagedTensorVersioned *new
    cdef DLManagedTensor *old
    if name == VERSIONED:
        new = <DLManagedTensorVersioned *>PyCapsule_GetPointer(capsule, name)
        new.deleter(new)
    elif name == OLD:
        old = <DLManagedTensor *>PyCapsule_GetPointer(capsule, name)
        old.deleter(old)
