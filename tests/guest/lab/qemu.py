"""QEMU's command line: the machine, its IOMMU and the devices in it."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

from . import cache, debian

_IOMMUS = {
    "intel": (["-device", "intel-iommu,intremap=on,caching-mode=on"], "intel_iommu=on"),
    "virtio": (["-device", "virtio-iommu-pci"], ""),
    "amd": (["-device", "amd-iommu,intremap=on,dma-remap=on"], ""),
    "none": ([], ""),
}
_CPU = "Nehalem"
"""Without AVX, which QEMU emulates slowly and numpy would use: a fifth faster than `max`."""
NVME_BLOCK = 512
NVME_BLOCKS = 4096


def installed() -> Path:
    """The folder of QEMU and its libraries (11 of Debian's backports; 10.1 is the first with vfio-user)."""
    without = "adduser|passwd|login|debconf|perl|libdb5|openssl-provider|readline|sensible|dpkg_|tar_"
    return cache.made("qemu", cache.key("1", debian.BACKPORTS), lambda path: debian.unpack(
        path, debian.BACKPORTS, "qemu-system-x86", without=without))


def command() -> list[str]:
    """The words that start QEMU on this host, without any option of a machine."""
    root = installed()
    return [*debian.linked(root, "usr/bin/qemu-system-x86_64"), "-L", f"{root}/usr/share/qemu", "-L",
            f"{root}/usr/share/seabios"]


def vfio_user(socket, **properties) -> list[str]:
    """The option that attaches QEMU to a vfio-user server."""
    device = {"driver": "vfio-user-pci", **properties, "socket": {"path": str(socket), "type": "unix"}}
    return ["-device", json.dumps(device)]


@dataclass(frozen=True)
class Machine:
    """What a guest is made of.

    Attributes
    ----------
    kernel : {'stock', 'own'}
    iommu : {'intel', 'virtio', 'amd', 'none'}
    sockets : list of path
        vfio-user servers, each behind a root port of its own: ``rp0``, ``rp1`` ...; the devices are ``maia0`` ... The
        first comes before all other devices, the rest after them.
    edu : int
        How many of QEMU's edu devices.
    nvme : path, optional
        The file behind QEMU's nvme, made by :func:`nvme_image`.
    memory : int
        MiB.
    shared : bool
        Whether the guest's memory has a file that vfio-user servers can map; without it their DMA goes by messages.
    cpus : int
    arguments, cmdline : list of str
        More words for QEMU, and for the kernel.
    """

    kernel: str = "own"
    iommu: str = "intel"
    sockets: list = field(default_factory=list)
    edu: int = 0
    nvme: Path | None = None
    memory: int = 1024
    shared: bool = True
    cpus: int = 1
    arguments: list = field(default_factory=list)
    cmdline: list = field(default_factory=list)

    def options(self) -> list[str]:
        """The options for QEMU, but for the kernel and what goes with it."""
        iommu, _ = _IOMMUS[self.iommu]
        machine = "q35"
        words = []
        if self.shared:
            words += ["-object", f"memory-backend-memfd,id=mem,size={self.memory}M,share=on"]
            machine += ",memory-backend=mem"
        words = ["-machine", machine, "-accel", "tcg,thread=multi", "-cpu", _CPU, "-smp", str(self.cpus), "-m",
                 str(self.memory), *words, "-nodefaults", "-display", "none", *iommu]
        servers = [["-device", f"pcie-root-port,id=rp{number},chassis={number + 1},bus=pcie.0",
                    *vfio_user(socket, id=f"maia{number}", bus=f"rp{number}")]
                   for number, socket in enumerate(self.sockets)]
        words += itertools.chain(*servers[:1])
        for number in range(self.edu):
            words += ["-device", f"edu,id=edu{number}"]
        if self.nvme:
            words += ["-drive", f"if=none,id=nvme0,file={self.nvme},format=raw",
                      "-device", "nvme,serial=MAIA-GUEST-LAB,drive=nvme0,id=nvme"]
        return [*words, *self.arguments, *itertools.chain(*servers[1:])]

    def kernel_line(self) -> str:
        """The kernel's command line."""
        _, words = _IOMMUS[self.iommu]
        return " ".join(["console=ttyS0", "rdinit=/init", "panic=-1", "random.trust_cpu=on", "mitigations=off", words,
                         *self.cmdline])


def nvme_image(path: Path) -> Path:
    """Make a disk for QEMU's nvme: 4,096 blocks of 512 bytes, each filled with :func:`nvme_block`."""
    path.write_bytes(b"".join(map(nvme_block, range(NVME_BLOCKS))))
    return path


def nvme_block(number: int) -> bytes:
    """Block `number` of the disk: the text ``block N\\n``, again and again, cut at 512 bytes."""
    text = b"block %d\n" % number
    return (text * (NVME_BLOCK // len(text) + 1))[:NVME_BLOCK]
