# cython: language_level=3
"""What a copy to or from a peer must know of the way there, where C finds it at once."""

from libc.stdint cimport uint64_t


cdef class Way:
    """The base of :class:`maia_rt.runtime.peer.PeerPath`.

    Attributes
    ----------
    _copies, _every : int
        Direct copies so far; one of so many is checked, 0 for none.
    """

    def _make_plain(self, shift, first, size, fds):
        """Let copies go without a second look from now on.

        Parameters
        ----------
        shift : int
            What is added to an address of the peer's, for the device.
        first, size : int
            The peer's HBM, as itself sees it.
        fds : two ints or None
            Hung up when the device or its peer is gone; None where that cannot be told.
        """
        for end, fd in enumerate(fds):
            self.ends[end].fd = -1 if fd is None else fd
            self.ends[end].events = POLLRDHUP
        self.shift, self.first, self.size = shift & 0xffffffffffffffff, first, size
        self.plain = True

    def _make_special(self):
        """Have every copy looked at, from now on."""
        self.plain = False

    cdef uint64_t reach(self, uint64_t address, uint64_t size):
        """Where the device finds memory of the peer's, and count the copy; 0 where that takes a second look."""
        if (not self.plain or address < self.first or size > self.size or address - self.first > self.size - size
                or (self._every and (self._copies + 1) % self._every == 0) or poll(self.ends, 2, 0)):
            return 0
        self._copies += 1
        return address + self.shift
