"""A userspace driver and runtime for a MAIA-like PCIe AI accelerator, and for the device that stands in for it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maia_rt.collectives import Collective, Communicator, Rank
    from maia_rt.contract.dtype import Dtype
    from maia_rt.contract.injection import Injection
    from maia_rt.contract.microscaling import from_mx, to_mx
    from maia_rt.loss import LostCommand
    from maia_rt.memory.space import Space
    from maia_rt.runtime.buffer import Buffer
    from maia_rt.runtime.capture import Capture
    from maia_rt.runtime.copy import CopyPath
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.discovery import DeviceInfo, devices, open
    from maia_rt.runtime.dlpack import from_dlpack
    from maia_rt.runtime.event import Event
    from maia_rt.runtime.graph import Graph, NodeTime
    from maia_rt.runtime.graph_builder import GraphBuilder
    from maia_rt.runtime.graph_node import GraphNode
    from maia_rt.runtime.hang import HangLink, HangPlace, HangReport, HangVerdict, HangWait
    from maia_rt.runtime.host_buffer import HostBuffer
    from maia_rt.runtime.peer import PeerPath
    from maia_rt.runtime.pool import MemoryPool, PoolStatistics
    from maia_rt.runtime.program import Kernel, Program
    from maia_rt.runtime.semaphore import Semaphore
    from maia_rt.runtime.spanning_graph import SpanningGraph
    from maia_rt.runtime.stream import Stream, StreamStatistics
    from maia_rt.runtime.topology import Link, Place, Topology, topology

__version__ = "0.1.0"

__all__ = [
    "Buffer",
    "Capture",
    "Collective",
    "Communicator",
    "CopyPath",
    "Device",
    "DeviceInfo",
    "Dtype",
    "Event",
    "Graph",
    "GraphBuilder",
    "GraphNode",
    "HangLink",
    "HangPlace",
    "HangReport",
    "HangVerdict",
    "HangWait",
    "HostBuffer",
    "Injection",
    "Kernel",
    "Link",
    "LostCommand",
    "MemoryPool",
    "NodeTime",
    "PeerPath",
    "Place",
    "PoolStatistics",
    "Program",
    "Rank",
    "Semaphore",
    "Space",
    "SpanningGraph",
    "Stream",
    "StreamStatistics",
    "Topology",
    "__version__",
    "devices",
    "from_dlpack",
    "from_mx",
    "open",
    "to_mx",
    "topology",
]

# Imported at first use: the emulator and the kernel builder import this package for its contract alone.
_HOMES = {
    "Buffer": "buffer", "Capture": "capture", "CopyPath": "copy", "Device": "device",
    "DeviceInfo": "discovery", "Event": "event",
    "Graph": "graph", "GraphBuilder": "graph_builder", "GraphNode": "graph_node", "NodeTime": "graph",
    "HangLink": "hang", "HangPlace": "hang", "HangReport": "hang", "HangVerdict": "hang", "HangWait": "hang",
    "HostBuffer": "host_buffer",
    "Injection": "contract.injection",
    "Kernel": "program", "LostCommand": "stream", "MemoryPool": "pool", "PeerPath": "peer",
    "PoolStatistics": "pool", "Program": "program",
    "Semaphore": "semaphore", "Space": "spaces", "SpanningGraph": "spanning_graph", "Stream": "stream",
    "StreamStatistics": "stream",
    "Link": "topology", "Place": "topology", "Topology": "topology", "topology": "topology",
    "devices": "discovery", "from_dlpack": "dlpack", "open": "discovery",
    "Collective": "collectives.collective", "Communicator": "collectives.communicator", "Rank": "collectives.rank",
    "Dtype": "contract.dtype", "from_mx": "contract.microscaling", "to_mx": "contract.microscaling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'maia_rt' has no attribute {name!r}")
    home = _HOMES[name]
    module = f"maia_rt.{home}" if "." in home else f"maia_rt.runtime.{home}"
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
