"""The model of links, which is off unless asked for: how long bytes take to a host or a peer, at least.

Every device has a port with two lanes, in and out, each of the same rate. Bytes between a device and host memory take
its own port; bytes between two devices take both ports, as below a PCIe switch. A lane is one word in the page where
the bell is: the time until which it is taken. Whoever moves a piece takes a lane from then on for as long as the piece
lasts, so that devices in different processes share a port too, piece by piece; a piece is there a latency after its
last byte has left. Time is real: a command is held until the model lets it end.
"""

from libc.stdint cimport uint64_t

from maia_emulator.bells cimport bell_t
from maia_emulator.support cimport clock_ns, load64, swap_if64

cdef enum:
    SANE_NS = 60000000000   # a lane taken for longer than that has been written to by a client


cdef uint64_t occupy(link_t *link, uint64_t since, uint64_t size, bint inward, bint outward, bell_t *source,
                     bell_t *target) noexcept nogil:
    """Take the lanes for a piece that could have left at ``since`` (0: now); returns when it has left.

    ``source`` and ``target`` are the bells of peers, NULL for host memory and peers whose BAR 2 is not mapped.
    """
    cdef uint64_t taken = <uint64_t> (size * link.ns_per_byte), end = 0
    if since == 0:
        since = clock_ns()
    if inward:
        end = take(&link.port.in_until, since, taken)
    if outward:
        end = max(end, take(&link.port.out_until, since, taken))
    if source != NULL:
        end = max(end, take(&source.out_until, since, taken))
    if target != NULL:
        end = max(end, take(&target.in_until, since, taken))
    return end


cdef uint64_t take(uint64_t *lane, uint64_t since, uint64_t taken) noexcept nogil:
    cdef uint64_t until, begin
    while True:
        until = load64(lane)
        begin = since if until < since or until - since > <uint64_t> SANE_NS else until
        if swap_if64(lane, until, begin + taken):
            return begin + taken
