"""The two kernels: Debian's own for cloud machines (VFIO by groups), and a small one with iommufd and VFIO's cdev."""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from . import cache, debian
from .debian import LabError

FRAGMENT = Path(__file__).with_name("kernel.fragment")
SOURCE = "linux-source-6.12"
RECIPE = 1
"""Grows when kernels are to be made anew, for another reason than a change of the fragment or the modules."""
MODULES = ("vfio", "vfio_iommu_type1", "vfio_pci", "virtio_iommu", "nvme", "uio_pci_generic")
"""What a guest may load of Debian's kernel; what these depend on comes with them."""


@dataclass(frozen=True)
class Kernel:
    """An ELF kernel, and where its modules are; the own kernel has none."""

    image: Path
    modules: Path | None


def stock() -> Kernel:
    """Debian's cloud kernel: groups and containers only."""
    folder = cache.made("kernel-stock", cache.key(RECIPE, *MODULES), _unpack_stock)
    return Kernel(folder / "vmlinux", folder / "modules")


def own() -> Kernel:
    """The small kernel built from Debian's source: group, cdev, iommufd, no-IOMMU mode."""
    return Kernel(cache.made("kernel-own", cache.key(RECIPE, FRAGMENT), _build) / "vmlinux", None)


KERNELS = {"stock": stock, "own": own}


def tools() -> Path:
    """A folder of Debian programs that the lab and its guests run: zstd, lspci, busybox."""
    return cache.made("tools", cache.key("1", debian.SUITE), lambda path: debian.unpack(
        path, debian.SUITE, "zstd", "pciutils", "busybox-static", without="perl|debconf|dpkg_|tar_|install-info"))


# --- Debian's kernel -------------------------------------------------------------------------------------------------


def _unpack_stock(path):
    name = debian.depends_on("linux-image-cloud-amd64", r"linux-image-\S+")
    unpacked = path.with_name(path.name + ".tree")
    try:
        archive = debian.download(name, unpacked / "debs")
        debian.unpack_archive(archive, unpacked)
        version = name.removeprefix("linux-image-")
        compressed = unpacked / f"boot/vmlinuz-{version}"
        if not compressed.exists():
            compressed = unpacked / f"usr/lib/modules/{version}/vmlinuz"
        path.mkdir()
        (path / "vmlinux").write_bytes(_elf(compressed.read_bytes()))
        _copy_modules(unpacked, version, path / "modules")
    finally:
        cache.remove(unpacked)


def _elf(image):
    """The ELF file in a bzImage: QEMU starts it without the decompressor, which is slow without KVM.

    Source: the kernel's Documentation/arch/x86/boot.rst (setup_sects 0x1f1, payload_offset 0x248, payload_length).
    """
    if image[0x202:0x206] != b"HdrS":
        raise LabError("Debian's kernel is no bzImage")
    start = ((image[0x1F1] or 4) + 1) * 512
    offset, length = (int.from_bytes(image[at:at + 4], "little") for at in (0x248, 0x24C))
    payload = image[start + offset:start + offset + length]
    if payload[:4] != b"\x28\xb5\x2f\xfd":
        raise LabError(f"Debian's kernel is compressed with something else than zstd: {payload[:4].hex()}")
    # The last four bytes are the unpacked size, which zstd would take for garbage.
    done = subprocess.run([*debian.linked(tools(), "usr/bin/zstd"), "-dqc"], input=payload[:-4], capture_output=True)
    if done.returncode or done.stdout[:4] != b"\x7fELF":
        raise LabError(f"Debian's kernel could not be unpacked: {done.stderr.decode()}")
    return done.stdout


def _copy_modules(unpacked, version, target):
    base = next(folder for folder in (unpacked / "usr/lib/modules", unpacked / "lib/modules") if folder.is_dir())
    files = {path.name.split(".")[0].replace("-", "_"): path for path in (base / version).rglob("*.ko*")}
    built_in = (base / version / "modules.builtin").read_text().replace("-", "_")
    folder = target / f"lib/modules/{version}"
    folder.mkdir(parents=True)
    wanted, seen = list(MODULES), set()
    while wanted:
        name = wanted.pop()
        if name in seen or f"/{name}.ko" in built_in:
            continue
        seen.add(name)
        data = files[name].read_bytes()
        data = lzma.decompress(data) if files[name].suffix == ".xz" else data
        (folder / f"{name}.ko").write_bytes(data)
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        wanted += [word.replace("-", "_") for word in depends[1].decode().split(",") if word] if depends else []
    for name in ("modules.builtin", "modules.order"):
        shutil.copy(base / version / name, folder)
    subprocess.run([tools() / "usr/bin/busybox", "depmod", "-b", target, version], check=True)


# --- the own kernel --------------------------------------------------------------------------------------------------


def _environment():
    """The environment in which a kernel can be built: what the host lacks comes from its own Debian release."""
    for name in ("make", "gcc"):
        if shutil.which(name) is None:
            raise LabError(f"there is no {name} to build the guest's kernel with\n  try: apt install {name}")
    env = {**os.environ, "LC_ALL": "C", "KBUILD_BUILD_TIMESTAMP": "@0", "KBUILD_BUILD_USER": "maia",
           "KBUILD_BUILD_HOST": "guest-lab"}
    absent = [name for name in ("flex", "bison", "bc", "m4", "xz") if shutil.which(name) is None]
    if not absent and Path("/usr/include/gelf.h").exists():
        return env
    root = cache.made("kernel-tools", cache.key("1", debian.host_suite()), lambda path: debian.unpack(
        path, debian.host_suite(), "flex", "bison", "bc", "m4", "xz-utils", "libelf-dev",
        without=r"libc6|libc-|linux-libc|libgcc|gcc|libcrypt|rpcsvc|libnsl|libtirpc|perl|debconf|dpkg_|tar_|readline-c"))
    libraries = root / debian.LIBRARIES
    return {**env, "PATH": f"{root}/usr/bin:{env['PATH']}", "LD_LIBRARY_PATH": str(libraries),
            "LIBRARY_PATH": str(libraries), "C_INCLUDE_PATH": f"{root}/usr/include", "M4": f"{root}/usr/bin/m4",
            "BISON_PKGDATADIR": f"{root}/usr/share/bison"}


def _build(path):
    env = _environment()
    unpacked = path.with_name(path.name + ".tree")
    try:
        archive = debian.download(SOURCE, unpacked)
        debian.unpack_archive(archive, unpacked)
        archive.unlink()
        subprocess.run(["tar", "-xJf", f"usr/src/{SOURCE}.tar.xz"], cwd=unpacked, env=env, check=True)
        tree = unpacked / SOURCE

        def make(*words):
            done = subprocess.run(["make", "-s", *words], cwd=tree, env=env, text=True, stdin=subprocess.DEVNULL,
                                  capture_output=True)
            if done.returncode:
                raise LabError(f"make {' '.join(words)} of the guest's kernel failed:\n{done.stderr[-3000:]}")

        make("tinyconfig")
        subprocess.run(["./scripts/kconfig/merge_config.sh", "-m", ".config", FRAGMENT], cwd=tree, env=env, check=True,
                       stdout=subprocess.DEVNULL)
        make("olddefconfig")
        # A wish that the configuration dropped must not go unnoticed.
        have = set((tree / ".config").read_text().splitlines())
        lost = [line for line in FRAGMENT.read_text().splitlines() if line.startswith("CONFIG_") and line not in have]
        if lost:
            raise LabError(f"the kernel's configuration did not take {', '.join(lost)}")
        make(f"-j{os.cpu_count()}", "vmlinux")
        path.mkdir()
        subprocess.run(["strip", "-o", path / "vmlinux", tree / "vmlinux"], check=True)
        shutil.copy(tree / ".config", path / "config")
    finally:
        cache.remove(unpacked)
