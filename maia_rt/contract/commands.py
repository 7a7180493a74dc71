"""Commands, completion records and admin commands: every structure that device and driver share in memory.

Little endian, naturally aligned, no padding but what is named ``reserved`` (written as zero, checked by the device).
docs/contract.md says what each field means and in which order things are written; ``_fast/commands.pxd`` is generated
from this file.
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import numpy.typing as npt

from maia_rt.contract import function

CONTRACT_MAJOR = 1
CONTRACT_MINOR = 2

COMMAND_BYTES = 64
REPORT_BYTES = 32
PROGRESS_BYTES = 64
DOORBELL_STRIDE = function.DOORBELL_STRIDE
SRAM_STRIDE_LOG2 = 32
"""Tile t's SRAM starts at TILE_SRAM_BASE + (t << SRAM_STRIDE_LOG2); clusters likewise."""


class Opcode(enum.IntEnum):
    """Command opcodes. 0 is none, so a zeroed slot is a fault and not a command."""

    NOP = 1
    COPY = 2
    COPY_ND = 3
    FILL = 4
    WRITE_IMM = 5
    LAUNCH = 6
    CRC = 7
    SIGNAL_REMOTE = 8
    INDIRECT = 9
    TRAP = 10
    WAIT_VALUE = 11
    BRANCH = 12


class CommandFlag(enum.IntFlag):
    """Command flags; other bits are a BAD_FIELD fault."""

    BARRIER = 1
    """The command starts only after every earlier command of its queue has retired."""
    REPORT = 2
    """Write a report record when the command is done, not only when it fails."""


class WaitOp(enum.IntEnum):
    """Pre-semaphore operations. Comparisons are serial: ``(int32)(semaphore - value)``."""

    NONE = 0
    GE = 1
    EQ = 2
    ACQUIRE = 3
    """Wait >=, then subtract the value, as one step."""


class PostOp(enum.IntEnum):
    """Post-semaphore operations."""

    NONE = 0
    SET = 1
    ADD = 2


class Condition(enum.IntEnum):
    """How WAIT_VALUE and BRANCH compare a word, after the mask, with their value."""

    GE = 1
    """Serially: ``(int32)((word & mask) - value) >= 0``."""
    EQ = 2
    NE = 3
    AND = 4
    """``word & mask & value`` is not zero."""


class BranchSource(enum.IntEnum):
    """What a BRANCH looks at."""

    MEMORY = 1
    """The 32-bit word at address ``where``."""
    SEMAPHORE = 2
    """Semaphore number ``where``."""


class ListOption(enum.IntFlag):
    """INDIRECT's ``options``; other bits are a BAD_FIELD fault."""

    CONCURRENT = 1
    """Listed commands need not wait for earlier ones, but for those with BARRIER and BRANCH."""


CRC_COMPARE = 1
"""``units`` of a CRC whose ``result`` holds the expected checksum and is read, not written."""

SEMAPHORE_OP = np.dtype(
    {"names": ["index", "op", "reserved", "value"], "formats": ["<u2", "u1", "u1", "<u4"],
     "offsets": [0, 2, 3, 4], "itemsize": 8}
)

_PRE_POST = [("pre", SEMAPHORE_OP, (2,)), ("post", SEMAPHORE_OP, (2,))]
_HEAD = [("opcode", "u1"), ("flags", "u1"), ("sequence", "<u2"), ("units", "<u4"), *_PRE_POST]


def _command(*payload: tuple[str, str] | tuple[str, str, tuple[int, ...]]) -> np.dtype[np.void]:
    dtype = np.dtype([*_HEAD, *payload])
    if dtype.itemsize != COMMAND_BYTES:
        raise AssertionError(f"a command is {COMMAND_BYTES} bytes, not {dtype.itemsize}")
    return dtype


COMMAND = _command(("payload", "<u8", (3,)))
"""Any command; ``units`` is a mask of clusters (LAUNCH; 0 is all), a byte count (WRITE_IMM) or CRC_COMPARE, else 0."""
COPY = _command(("src", "<u8"), ("dst", "<u8"), ("size", "<u8"))
COPY_ND = _command(("descriptor", "<u8"), ("reserved", "<u8", (2,)))
FILL = _command(("dst", "<u8"), ("size", "<u8"), ("pattern", "<u4"), ("width", "<u4"))
WRITE_IMM = _command(("dst", "<u8"), ("data", "u1", (16,)))
LAUNCH = _command(("kernel", "<u4"), ("arg_count", "<u4"), ("args", "<u8"), ("reserved", "<u8"))
CRC = _command(("src", "<u8"), ("size", "<u8"), ("result", "<u8"))
SIGNAL_REMOTE = _command(("address", "<u8"), ("op", "<u4"), ("value", "<u4"), ("reserved", "<u8"))
INDIRECT = _command(("list", "<u8"), ("count", "<u4"), ("options", "<u4"), ("times", "<u8"))
TRAP = _command(("code", "<u4"), ("reserved0", "<u4"), ("reserved1", "<u8", (2,)))
WAIT_VALUE = _command(("address", "<u8"), ("value", "<u4"), ("mask", "<u4"), ("condition", "<u4"), ("reserved", "<u4"))
BRANCH = _command(("where", "<u8"), ("value", "<u4"), ("mask", "<u4"), ("target", "<u4"), ("condition", "<u2"),
                  ("source", "<u2"))

LISTED_TIMES = np.dtype([("start_ns", "<u8"), ("end_ns", "<u8")])
"""What INDIRECT's ``times`` receives for each listed command: device time of its start, after its waits, and end."""

COPY_DESCRIPTOR = np.dtype(
    [("src", "<u8"), ("dst", "<u8"), ("row_bytes", "<u8"), ("rows", "<u4"), ("planes", "<u4"),
     ("src_row_stride", "<i8"), ("dst_row_stride", "<i8"), ("src_plane_stride", "<i8"), ("dst_plane_stride", "<i8")]
)
"""What a COPY_ND command points at (64 bytes, 64-byte aligned): planes x rows runs of row_bytes."""

MAX_INLINE_BYTES = 16
"""Bytes that one WRITE_IMM carries."""
MAX_INDIRECT = 1 << 20
"""Commands in one INDIRECT list."""

REPORT = np.dtype(
    [("sequence", "<u8"), ("start_ns", "<u8"), ("end_ns", "<u8"), ("status", "<u4"), ("detail", "<u4")]
)
"""A report record: ``status`` is a FaultCode, ``detail`` the index in the INDIRECT list or macro-operation."""

PROGRESS = np.dtype(
    [("progress", "<u8"), ("state", "<u4"), ("fault", "<u4"), ("fault_sequence", "<u8"), ("report_tail", "<u4"),
     ("reserved", "<u4"), ("reserved1", "<u8", (4,))]
)
"""A queue's progress block in host memory, 64 bytes, 64-byte aligned. The device writes ``fault`` and
``fault_sequence`` before ``state``, a report record before ``report_tail``, both before ``progress``."""


class QueueState(enum.IntEnum):
    """``PROGRESS['state']``."""

    RUNNING = 0
    STOPPED = 1
    """A command failed; nothing later has run. Reset the queue to use it again."""


# Admin queue -------------------------------------------------------------------------------------------------------


class AdminOpcode(enum.IntEnum):
    """Admin commands; docs/contract.md gives parameters and results."""

    IDENTIFY = 0x01
    CREATE_QUEUE = 0x10
    DELETE_QUEUE = 0x11
    RESET_QUEUE = 0x12
    LOAD_PROGRAM = 0x20
    UNLOAD_PROGRAM = 0x21
    CREATE_CONTEXT = 0x30
    DELETE_CONTEXT = 0x31
    SET_FEATURE = 0x40
    GET_FEATURE = 0x41
    ABORT = 0x50
    GET_LOG = 0x60
    INJECT = 0x70
    CLEAR_INJECTIONS = 0x71


class AdminStatus(enum.IntEnum):
    """``ADMIN_COMPLETION['status']``."""

    OK = 0
    INVALID_OPCODE = 1
    INVALID_FIELD = 2
    NO_RESOURCE = 3
    NOT_FOUND = 4
    IN_USE = 5
    BAD_ADDRESS = 6
    PROGRAM_REFUSED = 7
    INTERNAL = 8


class Feature(enum.IntEnum):
    """SET_FEATURE and GET_FEATURE; all are reset by CONTROL.ENABLE 0 -> 1."""

    WATCHDOG_MS = 1
    """Milliseconds after which an engine without progress is a fault; 0 never. Default 10,000."""


class Log(enum.IntEnum):
    """GET_LOG pages."""

    COUNTERS = 1
    """One COUNTERS record."""
    FAULTS = 2
    """FAULT records, oldest first; reading does not remove them."""
    QUEUES = 3
    """One QUEUE_LOG record a queue there is."""
    SEMAPHORES = 4
    """One SEMAPHORE_LOG record a semaphore that was ever written, or that a command had to wait for."""


class QueueStage(enum.IntEnum):
    """``QUEUE_LOG['stage']``: what a queue's next command is at. The first condition that is not met counts."""

    IDLE = 0
    BARRIER = 1
    """Earlier commands of the queue have not retired."""
    REPORT_ROOM = 2
    """The report ring is full."""
    SEMAPHORE = 3
    """A pre-semaphore operation is not satisfied."""
    VALUE = 4
    """A word of memory does not hold what is waited for."""
    TILES = 5
    """Not enough tiles are free."""
    RUNNING = 6
    """The command runs; or nothing is left to start, and the oldest launch runs."""


class SemaphoreWriter(enum.IntEnum):
    """``SEMAPHORE_LOG['writer']``: who wrote a semaphore last."""

    NONE = 0
    """Nobody since CONTROL.ENABLE."""
    QUEUE = 1
    """A command of a queue: a post, or the subtraction of ACQUIRE."""
    MIRROR = 2
    """The device: the progress of the queue of that number."""
    HOST = 3
    """The host or a peer, through BAR 2 or SEMAPHORE_OP."""


class InjectionKind(enum.IntEnum):
    """``INJECTION['kind']``."""

    FAULT = 1
    """The command fails with the code and address given, before it starts."""
    DELAY = 2
    """The command starts later."""
    HANG = 3
    """The command never gets anywhere: the watchdog, an abort or a reset ends it."""
    CORRUPT = 4
    """A bit of what the command wrote is flipped before anybody is told that it is done."""
    FIRMWARE = 5
    """Firmware stops: no heartbeat, no answer to admin commands. Queues run on."""
    GONE = 6
    """The device vanishes as in a surprise removal."""


ADMIN_COMMAND = np.dtype([("opcode", "<u2"), ("flags", "<u2"), ("id", "<u4"), ("p", "<u8", (7,))])
ADMIN_COMPLETION = np.dtype(
    [("id", "<u4"), ("status", "<u4"), ("result", "<u8", (2,)), ("sequence", "<u4"), ("reserved", "<u4")]
)
"""``sequence`` is the command's index + 1 modulo 2^32, written last: the record is valid once it is as expected."""

IDENTIFY = np.dtype(
    [("contract_major", "<u2"), ("contract_minor", "<u2"), ("profile", "<u4"), ("model", "S64"), ("firmware", "S32"),
     ("serial", "S32"), ("reserved", "u1", (376,))]
)
"""The IDENTIFY page, 512 bytes. Strings are UTF-8, padded with zeros."""

CREATE_QUEUE = np.dtype(
    [("ring", "<u8"), ("progress", "<u8"), ("reports", "<u8"), ("initial", "<u8"), ("entries_log2", "u1"),
     ("reports_log2", "u1"), ("vector", "<u2"), ("context", "<u2"), ("priority", "u1"), ("reserved0", "u1"),
     ("queue", "<u4"), ("reserved1", "<u4"), ("doorbell", "<u8")]
)
"""Parameters of CREATE_QUEUE, in place of ``p``. ``queue`` is the id asked for, or ANY_QUEUE; ``vector`` is
NO_VECTOR for none; ``initial`` is the free-running index that ring, doorbell and progress start at; ``doorbell`` is 0,
or the host address of a page that stands in for the one in BAR 2 (CAPS.HOST_DOORBELLS). Result 0: id."""
ANY_QUEUE = 0xFFFFFFFF
NO_VECTOR = 0xFFFF

RANGE = np.dtype([("base", "<u8"), ("size", "<u8")])
"""One range of CREATE_CONTEXT's list: of HBM or, with bounds, of host addresses."""

CONTEXT_BOUNDS = np.dtype(
    [("first_queue", "<u4"), ("queues", "<u4"), ("first_semaphore", "<u4"), ("semaphores", "<u4"),
     ("first_cluster", "<u4"), ("clusters", "<u4"), ("reserved", "<u8")]
)
"""What a bounded context has of the device, in the device's own numbers (CAPS.BOUNDED_CONTEXTS)."""
SCRUB = 1
"""DELETE_CONTEXT: what the context had reads as zero afterwards."""

COUNTER_NAMES = (
    "time_ns", "commands", "commands_failed", "doorbells", "wakes", "interrupts", "launches", "macro_ops", "macs",
    "vector_elements", "bytes_host_to_device", "bytes_device_to_host", "bytes_device_to_device", "bytes_host_to_host",
    "bytes_tile_in", "bytes_tile_out", "busy_ns_command", "busy_ns_dma", "busy_ns_tensor", "busy_ns_vector",
    "admin_commands", "dma_messages", "faults", "sleeps",
)
PEER_COUNTER_NAMES = ("bytes_from_peers", "bytes_to_peers")
"""Came with contract 1.2: older devices end before them."""
COUNTERS = np.dtype([*((n, "<u8") for n in COUNTER_NAMES), ("by_opcode", "<u8", (16,)),
                     *((n, "<u8") for n in PEER_COUNTER_NAMES)])
"""What the device did since CONTROL.ENABLE. ``macs`` are multiply-adds of tensor units, ``vector_elements`` results of
vector units; ``bytes_tile_*`` moved by tile DMA engines; ``bytes_*_peers`` are what this device itself read and wrote
there; ``by_opcode`` counts commands, those of INDIRECT lists too."""

FAULT = np.dtype(
    [("time_ns", "<u8"), ("sequence", "<u8"), ("address", "<u8"), ("code", "<u4"), ("queue", "<u4"), ("unit", "<u4"),
     ("detail", "<u4"), ("kernel", "<u4"), ("reserved", "<u4"), ("command", "u1", (64,)), ("reserved1", "u1", (16,))]
)
"""A fault log entry, 128 bytes: ``unit`` is the tile or NO_UNIT, ``detail`` as in REPORT, ``command`` as fetched."""
NO_UNIT = 0xFFFFFFFF
FAULT_LOG_ENTRIES = 64

QUEUE_LOG = np.dtype(
    [("time_ns", "<u8"), ("since_ns", "<u8"), ("head", "<u8"), ("retired", "<u8"), ("sequence", "<u8"),
     ("fault_sequence", "<u8"), ("address", "<u8"), ("queue", "<u4"), ("tail", "<u4"), ("state", "<u4"),
     ("fault", "<u4"), ("stage", "<u4"), ("semaphore", "<u4"), ("value", "<u4"), ("wanted", "<u4"),
     ("condition", "<u4"), ("mask", "<u4"), ("list_index", "<u4"), ("list_count", "<u4"), ("in_flight", "<u4"),
     ("report_tail", "<u4"), ("report_head", "<u4"), ("reserved", "<u4", (3,)), ("command", "u1", (64,))]
)
"""What one queue is at, 192 bytes: ``command`` is the one under way, of a list the listed one."""
NO_SEMAPHORE = 0xFFFFFFFF

SEMAPHORE_LOG = np.dtype(
    [("time_ns", "<u8"), ("sequence", "<u8"), ("index", "<u4"), ("value", "<u4"), ("queue", "<u4"), ("writer", "<u4")]
)
"""A semaphore and who wrote it last, 32 bytes."""
NO_QUEUE = 0xFFFFFFFF

INJECTION = np.dtype(
    [("kind", "u1"), ("flags", "u1"), ("code", "<u2"), ("opcodes", "<u4"), ("queue", "<u4"), ("after", "<u4"),
     ("every", "<u4"), ("times", "<u4"), ("probability", "<u4"), ("reserved0", "<u4"), ("sequence", "<u8"),
     ("value", "<u8"), ("seed", "<u8")]
)
"""Parameters of INJECT, in place of ``p``; :class:`maia_rt.contract.injection.Injection` writes and reads them."""
INJECT_NOW = 1
"""``INJECTION['flags']``: FIRMWARE and GONE come as soon as INJECT has completed, not at a command."""
INJECT_ENDS = 2
"""FIRMWARE: it says that it failed (STATUS.BOOT), instead of falling silent. GONE: the server ends the connection."""
INJECT_DRAWN = 4
"""CORRUPT: the seed draws the bit, ``value`` is zero."""
MAX_INJECTIONS = 32
"""Injections that may be armed at one time."""


def decode(raw: bytes | npt.NDArray[Any]) -> str:
    """One command as a line of text, for errors and tools.

    Parameters
    ----------
    raw : bytes or ndarray of uint8
        The 64 bytes as they lie in the ring.

    Returns
    -------
    str
        Such as ``COPY src=0x10000 dst=0x1000000000000 size=4096 pre=[#70>=3]``. Unknown opcodes are shown in hex.
    """
    data = bytes(raw)
    if len(data) != COMMAND_BYTES:
        return f"{len(data)} bytes that are no command"
    head = np.frombuffer(data, COMMAND)[0]
    try:
        opcode = Opcode(int(head["opcode"]))
    except ValueError:
        return f"opcode {int(head['opcode']):#04x}"
    parts = [opcode.name, *_payload(opcode, data)]
    if int(head["units"]) and opcode is not Opcode.CRC:
        parts.append(f"units={int(head['units']):#x}")
    parts += [flag.name or "" for flag in CommandFlag if int(head["flags"]) & flag]
    for field, ops, signs in (("pre", WaitOp, _WAIT_SIGNS), ("post", PostOp, _POST_SIGNS)):
        shown_ops = [f"#{int(s['index'])}{signs.get(int(s['op']), '?')}{int(s['value'])}"
                     for s in head[field] if int(s["op"]) != ops.NONE]
        if shown_ops:
            parts.append(f"{field}=[{' '.join(shown_ops)}]")
    return " ".join(parts)


def _payload(opcode: Opcode, data: bytes) -> list[str]:
    """A command's own fields as text."""
    dtype = _PAYLOADS.get(opcode)
    if dtype is None:
        return []
    row = np.frombuffer(data, dtype)[0]
    if opcode in (Opcode.WAIT_VALUE, Opcode.BRANCH):
        return [_condition(opcode, row)]
    parts = []
    for name in (dtype.names or ())[len(_HEAD):]:
        value = row[name]
        if name.startswith("reserved") or (name in ("options", "times") and not int(value)):
            continue
        if isinstance(value, np.ndarray):
            parts.append(f"{name}={value.tobytes().hex()}")
        elif name == "options":
            parts.append("CONCURRENT" if int(value) == ListOption.CONCURRENT else f"options={int(value):#x}")
        else:
            shown = f"{int(value)}" if name in _DECIMAL else f"{int(value):#x}"
            compared = name == "result" and int(row["units"]) == CRC_COMPARE
            parts.append(f"{'expected' if compared else name}={shown}")
    return parts


def _condition(opcode: Opcode, row: np.void) -> str:
    """Such as ``until u32[0x10040]&0xff >= 3``, or ``to 4 if #70 != 10``."""
    value, mask = int(row["value"]), int(row["mask"])
    if opcode is Opcode.WAIT_VALUE:
        word = f"u32[{int(row['address']):#x}]"
    elif int(row["source"]) == BranchSource.SEMAPHORE:
        word = f"#{int(row['where'])}"
    else:
        word = f"u32[{int(row['where']):#x}]"
    if mask != 0xFFFFFFFF:
        word += f"&{mask:#x}"
    sign = _CONDITION_SIGNS.get(int(row["condition"]), f"condition {int(row['condition'])}?")
    shown = f"{value:#x} != 0" if int(row["condition"]) == Condition.AND else f"{value}"
    text = f"{word} {sign} {shown}"
    return f"until {text}" if opcode is Opcode.WAIT_VALUE else f"to {int(row['target'])} if {text}"


_CONDITION_SIGNS = {1: ">=", 2: "==", 3: "!=", 4: "&"}
_DECIMAL = {"size", "width", "arg_count", "count", "kernel", "code"}
_WAIT_SIGNS = {1: ">=", 2: "==", 3: ">=-"}
_POST_SIGNS = {1: "=", 2: "+="}
_PAYLOADS: dict[Opcode, np.dtype[np.void]] = {
    Opcode.COPY: COPY, Opcode.COPY_ND: COPY_ND, Opcode.FILL: FILL, Opcode.WRITE_IMM: WRITE_IMM, Opcode.LAUNCH: LAUNCH,
    Opcode.CRC: CRC, Opcode.SIGNAL_REMOTE: SIGNAL_REMOTE, Opcode.INDIRECT: INDIRECT, Opcode.TRAP: TRAP,
    Opcode.WAIT_VALUE: WAIT_VALUE, Opcode.BRANCH: BRANCH,
}
