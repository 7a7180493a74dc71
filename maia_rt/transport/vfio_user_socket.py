"""Reaching the socket that a vfio-user server listens on."""

from __future__ import annotations

import errno
import math
import os
import socket
import stat

from maia_rt.errors import (
    DeviceBusy,
    DeviceNotFound,
    DevicePermission,
    InvalidArgument,
    ProtocolError,
    TransportError,
)


def connect(sock: socket.socket, path: str) -> None:
    """Connect `sock` to `path`, or raise the typed error that fits; see :meth:`VfioUserClient.connect`."""
    hint = "start a server there, for example: maia emulate --socket PATH"
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise DeviceNotFound(f"{path} is not a socket", hint=hint)
        sock.connect(path)
    except FileNotFoundError:
        raise DeviceNotFound(f"there is no socket {path}", hint=hint) from None
    except NotADirectoryError:
        raise DeviceNotFound(f"there is no socket {path}: a part of the path is not a directory", hint=hint) from None
    except ConnectionRefusedError:
        raise DeviceNotFound(f"nobody listens on {path}", cause="its server has ended", hint=hint) from None
    except PermissionError as error:
        raise DevicePermission(f"{path} may not be opened: {error.strerror}",
                               hint="run as the user who started the server") from None
    except (BlockingIOError, TimeoutError):
        raise DeviceBusy(f"{path}: the server does not take the connection", cause="it serves another client") from None
    except OSError as error:
        if error.errno == errno.EPROTOTYPE:
            raise ProtocolError(f"{path} is not a stream socket", errno=errno.EPROTOTYPE) from None
        if error.errno is None or error.errno == errno.ENAMETOOLONG:
            raise InvalidArgument(f"{path}: the path is too long for a socket: {error}") from None
        raise TransportError(f"{path} cannot be opened: {error.strerror}", errno=error.errno) from None


def check_timeout(timeout: float) -> None:
    """Raise InvalidArgument unless `timeout` is a positive, finite number of seconds."""
    if not (timeout > 0 and math.isfinite(timeout)):
        raise InvalidArgument(f"the time-out must be a positive number of seconds, not {timeout}")
