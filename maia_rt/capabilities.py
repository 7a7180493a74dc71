"""What a device offers, read from its registers."""

from __future__ import annotations

from dataclasses import dataclass

from maia_rt.contract.commands import CONTRACT_MAJOR
from maia_rt.contract.dtype import MX_DTYPES, Dtype
from maia_rt.contract.program import Capabilities as ProgramCapabilities
from maia_rt.contract.registers import BAR0, BAR0_BYTES, Bar0
from maia_rt.errors import ContractMismatch, DeviceLost
from maia_rt.transport import Transport
from maia_rt.transport.uapi import PciRegion


@dataclass(frozen=True)
class Capabilities:
    """What a device offers, from its registers.

    Sizes are in bytes, ``*_log2`` are base-2 logarithms of entries, ``contract`` is (major, minor). ``list_options``
    stands for INDIRECT's CONCURRENT and times; queues have priorities 0 .. ``priorities`` - 1, larger ones first.
    """

    contract: tuple[int, int]
    profile: int
    emulated: bool
    revision: int
    serial: int
    needs_wake: bool
    indirect: bool
    signal_remote: bool
    crc: bool
    injection: bool
    wait_value: bool
    branch: bool
    list_options: bool
    crc_compare: bool
    bounded_contexts: bool
    host_doorbells: bool
    priorities: int
    dtypes: frozenset[Dtype]
    max_queues: int
    max_entries_log2: int
    min_entries_log2: int
    semaphores: int
    pre_ops: int
    post_ops: int
    max_contexts: int
    ranges_per_context: int
    max_kernels: int
    max_args: int
    tile_semaphores: int
    clusters: int
    tiles_per_cluster: int
    semaphore_window: int
    host_address_bits: int
    host_first: int
    host_last: int
    hbm_base: int
    hbm_bytes: int
    cluster_sram_base: int
    tile_sram_base: int
    cluster_sram_bytes: int
    tile_sram_bytes: int

    @property
    def tiles(self) -> int:
        """Tiles of the whole device."""
        return self.clusters * self.tiles_per_cluster

    @property
    def program(self) -> ProgramCapabilities:
        """What the program verifier is told."""
        return ProgramCapabilities(self.tiles, self.tile_sram_bytes, self.tile_semaphores, self.max_args,
                                   self.max_kernels, self.dtypes)


_ALWAYS = (Dtype.INT32, Dtype.UINT8)
"""What every device moves and gathers with; the other types have a bit, FP8 and MX one for the family."""


def read_capabilities(transport: Transport) -> Capabilities:
    """Check that the device is one of ours and read what it offers.

    Raises
    ------
    ContractMismatch
        It is none, or speaks another major version.
    DeviceLost
        It reads as all ones.
    """

    def register(name: str) -> int:
        return transport.read(PciRegion.BAR0, BAR0[name].offset, BAR0[name].width_bytes)

    name = transport.name
    if transport.region(PciRegion.BAR0).size < BAR0_BYTES:
        raise ContractMismatch(f"{name}: BAR 0 has {transport.region(PciRegion.BAR0).size} bytes",
                               cause="the device is not MAIA-like", hint="select another device")
    identity = transport.read(PciRegion.BAR0, Bar0.ID, 4)
    if identity == 0xFFFFFFFF:
        raise DeviceLost(f"{name}: registers read as all ones", cause="the link is down or the device is in reset",
                         hint="look at the slot's power and reset the device")
    if identity != BAR0["ID"].reset:
        raise ContractMismatch(f"{name}: the identity register reads {identity:#010x}",
                               cause="the device is not MAIA-like", hint="select another device")
    version = BAR0["VERSION"].decode(register("VERSION"))
    if version["MAJOR"] != CONTRACT_MAJOR:
        raise ContractMismatch(
            f"{name}: the device speaks contract {version['MAJOR']}.{version['MINOR']}, this driver "
            f"{CONTRACT_MAJOR}.x", cause="firmware and driver are of different generations",
            hint="update the older of the two")
    device, caps, queues, semaphores, contexts, programs, topology, scheduling = (
        BAR0[r].decode(register(r)) for r in ("DEVICE", "CAPS", "QUEUE_CAPS", "SEMAPHORE_CAPS", "CONTEXT_CAPS",
                                               "PROGRAM_CAPS", "TOPOLOGY", "SCHEDULING_CAPS"))
    lacking = {d for d in Dtype if d not in _ALWAYS and not caps["MX" if d in MX_DTYPES else d.name.split("_")[0]]}
    return Capabilities(
        contract=(version["MAJOR"], version["MINOR"]), profile=device["PROFILE"],
        emulated=bool(device["EMULATED"]), revision=device["REVISION"], serial=register("SERIAL"),
        needs_wake=bool(caps["NEEDS_WAKE"]), indirect=bool(caps["INDIRECT"]),
        signal_remote=bool(caps["SIGNAL_REMOTE"]), crc=bool(caps["CRC"]),
        injection=bool(caps["INJECTION"]),
        wait_value=bool(caps["WAIT_VALUE"]), branch=bool(caps["BRANCH"]), list_options=bool(caps["LIST_OPTIONS"]),
        crc_compare=bool(caps["CRC_COMPARE"]), bounded_contexts=bool(caps["BOUNDED_CONTEXTS"]),
        host_doorbells=bool(caps["HOST_DOORBELLS"]), priorities=scheduling["PRIORITIES"] or 1,
        dtypes=frozenset(set(Dtype) - lacking),
        max_queues=queues["MAX_QUEUES"], max_entries_log2=queues["MAX_ENTRIES_LOG2"],
        min_entries_log2=queues["MIN_ENTRIES_LOG2"], semaphores=semaphores["COUNT"],
        pre_ops=semaphores["PRE_OPS"], post_ops=semaphores["POST_OPS"], max_contexts=contexts["MAX_CONTEXTS"],
        ranges_per_context=contexts["RANGES"], max_kernels=programs["MAX_KERNELS"], max_args=programs["MAX_ARGS"],
        tile_semaphores=programs["TILE_SEMAPHORES"], clusters=topology["CLUSTERS"],
        tiles_per_cluster=topology["TILES_PER_CLUSTER"], semaphore_window=register("SEMAPHORE_WINDOW"),
        host_address_bits=BAR0["HOST_ADDRESS"].get(register("HOST_ADDRESS"), "BITS"),
        host_first=register("HOST_FIRST"), host_last=register("HOST_LAST"),
        hbm_base=register("HBM_BASE"), hbm_bytes=register("HBM_SIZE"),
        cluster_sram_base=register("CLUSTER_SRAM_BASE"), tile_sram_base=register("TILE_SRAM_BASE"),
        cluster_sram_bytes=register("CLUSTER_SRAM_SIZE"), tile_sram_bytes=register("TILE_SRAM_SIZE"))
