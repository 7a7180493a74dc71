"""cpio archives in the "newc" format, which the kernel unpacks into its first file system.

Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. Several may follow each other in one
file; each starts at a multiple of 4 bytes.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


class Archive:
    """An archive being written to a file; all its members belong to root.

    Parameters
    ----------
    file : binary file
        Open for writing; the archive is ended by :meth:`close`.
    """

    def __init__(self, file):
        self._file = file
        self._folders = set()
        self._written = 0
        self._inode = 0

    def _member(self, name, mode, data=b"", mtime=0):
        self._inode += 1
        path = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, int(mtime), len(data), 0, 0, 0, 0, len(path), 0)
        header = b"070701" + b"".join(b"%08X" % value for value in fields) + path
        header += bytes(-len(header) % 4)
        self._file.write(header + data + bytes(-len(data) % 4))

    def _parents(self, name):
        for parent in reversed(Path(name).parents):
            if str(parent) not in (".", "/"):
                self.folder(str(parent))

    def folder(self, name):
        """A folder; its parents come by themselves, as they do for every member."""
        name = name.strip("/")
        if name not in self._folders:
            self._parents(name)
            self._folders.add(name)
            self._member(name, stat.S_IFDIR | 0o755)

    def text(self, name, text, mode=0o644):
        """A file of this text."""
        self.bytes(name, text.encode(), mode)

    def bytes(self, name, data, mode=0o644, mtime=0):
        """A file of these bytes."""
        self._parents(name.strip("/"))
        self._member(name.strip("/"), stat.S_IFREG | mode, data, mtime)

    def link(self, name, target):
        """A symbolic link."""
        self._parents(name.strip("/"))
        self._member(name.strip("/"), stat.S_IFLNK | 0o777, target.encode())

    def copy(self, name, source):
        """A file of the host, with its time and whether it can be executed."""
        status = os.stat(source)
        self.bytes(name, Path(source).read_bytes(), 0o755 if status.st_mode & 0o111 else 0o644, status.st_mtime)

    def tree(self, name, source):
        """A folder of the host and all in it; links stay links."""
        self.folder(name)
        for folder, folders, files in os.walk(source):
            place = os.path.normpath(os.path.join(name, os.path.relpath(folder, source)))
            for entry in sorted(folders + files):
                path = os.path.join(folder, entry)
                if os.path.islink(path):
                    self.link(f"{place}/{entry}", os.readlink(path))
                elif os.path.isdir(path):
                    self.folder(f"{place}/{entry}")
                elif os.path.isfile(path):
                    self.copy(f"{place}/{entry}", path)

    def close(self):
        """End the archive."""
        self._member("TRAILER!!!", 0)
        self._file.write(bytes(-self._file.tell() % 512))
