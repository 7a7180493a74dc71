"""The VERSION message of vfio-user: what the two ends tell each other first.

    u16 major | u16 minor | {"capabilities":{...}} NUL        the text, with its NUL, may be absent

Source: the vfio-user specification, section Version. QEMU's limits are noted where they bind.
"""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from maia_rt.errors import ProtocolError

VERSION_MAJOR: Final = 0
VERSION_MINOR: Final = 0
"""QEMU refuses a server that answers a minor above 0."""

DEFAULT_MAX_MSG_FDS: Final = 1
DEFAULT_MAX_DATA_XFER_SIZE: Final = 1 << 20
DEFAULT_MAX_DMA_MAPS: Final = 65535
DEFAULT_PGSIZES: Final = 4096
MAX_MSG_FDS: Final = 253
"""The kernel's SCM_MAX_FD: more descriptors than this never travel with one message."""

VERSION: Final = struct.Struct("<HH")
"""major, minor; JSON text with its NUL may follow."""


@dataclass(frozen=True)
class Capabilities:
    """What the sender of a VERSION message can take. The defaults are the specification's, for keys that are absent."""

    max_msg_fds: int = DEFAULT_MAX_MSG_FDS
    max_data_xfer_size: int = DEFAULT_MAX_DATA_XFER_SIZE
    max_dma_maps: int = DEFAULT_MAX_DMA_MAPS
    pgsizes: int = DEFAULT_PGSIZES
    write_multiple: bool = False
    twin_socket: bool = False
    twin_fd_index: int | None = None


@dataclass(frozen=True)
class Version:
    """A parsed VERSION payload.

    Attributes
    ----------
    offered : frozenset of str
        The capability keys that the text named. A reply may name no others.
    """

    major: int
    minor: int
    capabilities: Capabilities
    offered: frozenset[str]


_ALL_KEYS: Final = ("max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes", "write_multiple", "twin_socket")


def pack_version(
    capabilities: Capabilities, *, keys: Iterable[str] | None = None, major: int = VERSION_MAJOR,
    minor: int = VERSION_MINOR,
) -> bytes:
    """Return a VERSION payload.

    Parameters
    ----------
    capabilities : Capabilities
    keys : iterable of str, optional
        The capability keys to name, by default all; ``twin_socket`` is named only where it is supported. A server
        passes the keys that the client offered. QEMU reads the reply into a buffer of its request's size, hence no
        white space.
    """
    wanted = set(_ALL_KEYS if keys is None else keys)
    caps: dict[str, Any] = {
        key: getattr(capabilities, key) for key in _ALL_KEYS if key in wanted and key != "twin_socket"
    }
    if "twin_socket" in wanted and capabilities.twin_socket:
        twin: dict[str, Any] = {"supported": True}
        if capabilities.twin_fd_index is not None:
            twin["fd_index"] = capabilities.twin_fd_index
        caps["twin_socket"] = twin
    text = json.dumps({"capabilities": caps}, separators=(",", ":"))
    return VERSION.pack(major, minor) + text.encode() + b"\0"


def unpack_version(payload: bytes | bytearray | memoryview) -> Version:
    """Parse and check a VERSION payload (specification, section Version).

    Unknown keys are ignored. The major number is not judged here.

    Raises
    ------
    ProtocolError
        With errno EINVAL: too short, no NUL at the end, broken JSON, a known key of the wrong type or out of range.
    """
    if len(payload) < VERSION.size:
        raise _bad_version(f"the payload has {len(payload)} bytes, at least {VERSION.size} are needed")
    major, minor = VERSION.unpack_from(payload)
    raw = bytes(payload[VERSION.size:])
    if not raw:
        return Version(major, minor, Capabilities(), frozenset())
    if raw[-1] != 0:
        raise _bad_version("the JSON text does not end in NUL")
    try:
        document = json.loads(raw[:-1].decode())
    except (ValueError, RecursionError) as error:
        raise _bad_version(f"the JSON text cannot be parsed: {error}") from None
    if not isinstance(document, dict):
        raise _bad_version("the JSON text is not an object")
    caps = document.get("capabilities", {})
    if not isinstance(caps, dict):
        raise _bad_version("'capabilities' is not an object")
    write_multiple = caps.get("write_multiple", False)
    if not isinstance(write_multiple, bool):
        raise _bad_version("'write_multiple' is not true or false")
    twin_socket, twin_fd_index = _twin(caps.get("twin_socket", {}))
    _check_migration(caps.get("migration", {}))
    capabilities = Capabilities(
        max_msg_fds=_integer(caps, "max_msg_fds", DEFAULT_MAX_MSG_FDS, 0, 1024),
        max_data_xfer_size=_integer(caps, "max_data_xfer_size", DEFAULT_MAX_DATA_XFER_SIZE, 1, 2**64 - 1),
        max_dma_maps=_integer(caps, "max_dma_maps", DEFAULT_MAX_DMA_MAPS, 0, 2**64 - 1),
        pgsizes=_integer(caps, "pgsizes", DEFAULT_PGSIZES, 1, 2**64 - 1),
        write_multiple=write_multiple,
        twin_socket=twin_socket,
        twin_fd_index=twin_fd_index,
    )
    return Version(major, minor, capabilities, frozenset(caps))


def _bad_version(reason: str) -> ProtocolError:
    return ProtocolError(f"bad VERSION message: {reason}", errno=errno.EINVAL)


def _integer(mapping: dict[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = mapping.get(key.rpartition(".")[2], default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _bad_version(f"'{key}' is not an integer")
    if not low <= value <= high:
        raise _bad_version(f"'{key}' is {value}, not within {low} to {high}")
    return value


def _twin(twin: Any) -> tuple[bool, int | None]:
    if not isinstance(twin, dict):
        raise _bad_version("'twin_socket' is not an object")
    supported = twin.get("supported", False)
    if not isinstance(supported, bool):
        raise _bad_version("'twin_socket.supported' is not true or false")
    fd_index = _integer(twin, "twin_socket.fd_index", 0, 0, MAX_MSG_FDS) if "fd_index" in twin else None
    return supported, fd_index


def _check_migration(migration: Any) -> None:
    # QEMU and libvfio-user still send this object of the old migration protocol: checked, then unused.
    if not isinstance(migration, dict):
        raise _bad_version("'migration' is not an object")
    page = _integer(migration, "migration.pgsize", 4096, 1, 2**64 - 1)
    if page % 4096:
        raise _bad_version(f"'migration.pgsize' is {page}, not a multiple of 4096")
    _integer(migration, "migration.max_bitmap_size", 0, 0, 2**64 - 1)
