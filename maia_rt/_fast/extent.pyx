# cython: language_level=3
"""What a launch or a copy must know of a piece of memory, where C finds it at once."""

cdef set _nothing = set()


cdef class Extent:
    """The base of :class:`maia_rt.runtime.buffer.Memory`.

    Attributes
    ----------
    _address : int
        Of its first element, on the device.
    _parent : Extent or None
        The buffer that it is a view of.
    _closed : bool
        Whether it has been given back; of a view, its parent's counts. True until it has been made.
    _fits : set
        The arguments of kernels that it has been found to fit; empty ones are shared, and never written.
    _run : int
        Bytes, where all of them lie side by side; else 0.
    readonly : bool
    device : Device
    """

    def __cinit__(self):
        self._closed = True
        self._fits = _nothing
