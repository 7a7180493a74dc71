from libc.stdint cimport uint32_t, uint64_t

from maia_emulator.memory cimport DeviceMemory, context_t, traffic_t
from maia_rt._fast.commands cimport command_t, copy_descriptor_t

cdef struct work_t:         # how far a long command has come
    uint64_t done           # bytes, or whole rows
    uint64_t within         # bytes of the next row
    uint32_t crc
    uint32_t word           # as WAIT_VALUE saw it last
    bint begun
    copy_descriptor_t shape

cdef uint32_t check_command(command_t *command, bint listed, uint32_t mirrors, uint32_t semaphores) noexcept nogil
cdef enum:
    PLACED = 0x80           # in a command's flags, where no driver's bit is: its numbers are the device's own by now

cdef uint32_t check_confined(command_t *command, bint listed, context_t *context) noexcept nogil
cdef void as_fetched(command_t *command, context_t *context) noexcept nogil
cdef uint32_t run_command(DeviceMemory memory, command_t *command, work_t *work, context_t *context,
                          traffic_t *traffic, bint *finished, uint64_t *bad) noexcept nogil
