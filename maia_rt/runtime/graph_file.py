"""Graphs in files: nodes by name and offset of their buffers, and the programs they launch; no addresses, no pickle.

    "MAIAGRPH", version (u32), header bytes (u32), SHA-256 of all that follows (32 bytes)
    header: JSON
    program images, one after the other

What is loaded is built with the calls that anybody builds graphs with: nothing in a file reaches the device unchecked.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes  # noqa: F401  makes its dtypes known to numpy by name
import numpy as np

from maia_rt.contract.commands import CONTRACT_MAJOR, CONTRACT_MINOR, MAX_INDIRECT
from maia_rt.contract.program import ArgKind, write
from maia_rt.errors import ContractMismatch, InvalidArgument, InvalidType, MaiaError, Unsupported
from maia_rt.runtime import check
from maia_rt.runtime.buffer import Memory
from maia_rt.runtime.graph_builder import GraphBuilder
from maia_rt.runtime.graph_layout import MAX_DEPTH, Step
from maia_rt.runtime.graph_node import GraphNode
from maia_rt.runtime.graph_operation import SAVED, LaunchOperation
from maia_rt.runtime.program import Kernel, Program
from maia_rt.runtime.semaphore import Semaphore

if TYPE_CHECKING:
    from maia_rt.runtime.device import Device
    from maia_rt.runtime.graph import Graph

MAGIC: Final = b"MAIAGRPH"
VERSION: Final = 1
_HEAD: Final = struct.Struct("<8sII32s")
_MOST_BYTES: Final = 1 << 31
_LONGEST_TEXT: Final = 500


# --- save ------------------------------------------------------------------------------------------------------------


def save(graph: Graph, path: str | Path, buffers: Mapping[str, Memory]) -> None:
    """Write a graph to a file; see :meth:`maia_rt.Graph.save`."""
    writer = _Writer(buffers)
    nodes = writer.nodes(graph._layout.roots)
    unused = [name for name, root in writer.names.items() if root not in writer.slots]
    if unused:
        raise InvalidArgument(f"no node uses the buffer {unused[0]!r}", hint="leave it out")
    images = [write([program[name]._image for name in program]) for program in writer.programs]
    header = {
        "contract": [CONTRACT_MAJOR, CONTRACT_MINOR], "needs": sorted(writer.needs),
        "buffers": [writer.slot(root) for root in writer.slots], "semaphores": len(writer.semaphores),
        "programs": [{"bytes": len(image), "sha256": hashlib.sha256(image).hexdigest()} for image in images],
        "nodes": nodes,
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    rest = text + b"".join(images)
    Path(path).write_bytes(_HEAD.pack(MAGIC, VERSION, len(text), hashlib.sha256(rest).digest()) + rest)


class _Writer:
    """Gives buffers, semaphores and programs their numbers while nodes are written."""

    def __init__(self, buffers: Mapping[str, Memory]) -> None:
        self.names: dict[str, Memory] = {}
        for name, memory in buffers.items():
            if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_TEXT:
                raise InvalidType(f"a buffer's name is a text, not {name!r:.40}")
            root = _memory(memory, name)._root
            if root in self.names.values():
                raise InvalidArgument(f"{name!r} is a second name for {root!r}")
            self.names[name] = root
        self.slots: dict[Memory, int] = {}
        self.semaphores: dict[Semaphore, int] = {}
        self.programs: dict[Program, int] = {}
        self.needs: set[str] = set()
        self._alignments: dict[Memory, int] = {}

    def nodes(self, steps: list[Step]) -> list[dict[str, Any]]:
        numbers = {id(step): number for number, step in enumerate(steps)}
        return [self._node(step, [numbers[id(one)] for one in step.after]) for step in steps]

    def slot(self, root: Memory) -> dict[str, Any]:
        name = next((name for name, one in self.names.items() if one is root), f"buffer{self.slots[root]}")
        return {"name": name, "bytes": root.nbytes, "dtype": None if root.dtype is None else root.dtype.name,
                "shape": list(root.shape), "alignment": self._alignments.get(root, 1)}

    def _node(self, step: Step, after: list[int]) -> dict[str, Any]:
        operation = step.operation
        operation._require_open()
        if operation.noun not in SAVED:
            raise Unsupported(f"a {operation.noun} is not saved: {operation._text}, made at {step.node.where}",
                              hint="capture it anew where the graph is loaded")
        found: dict[str, Any] = {"do": operation.noun, "after": after, "where": step.node.where[-_LONGEST_TEXT:]}
        if operation.noun in ("loop", "condition"):
            self.needs.add("branch")
            found["body"] = self.nodes(step.body)
        if operation.noun == "wait" and not hasattr(operation, "semaphore"):
            self.needs.add("wait_value")
        for name in operation.__dataclass_fields__:
            if name not in ("device", "kernel"):
                found[name] = self._value(getattr(operation, name))
        if isinstance(operation, LaunchOperation):
            kernel = operation.kernel
            found["kernel"] = [self.programs.setdefault(kernel.program, len(self.programs)), kernel.name]
            for arg, memory in zip(kernel.args, operation.args, strict=True):
                if arg.kind != ArgKind.SCALAR and not (memory._address - memory._root._address) % arg.alignment:
                    known = self._alignments.get(memory._root, 1)
                    self._alignments[memory._root] = max(known, arg.alignment)
        return found

    def _value(self, value: Any) -> Any:
        if isinstance(value, Memory):
            root = value._root
            return {"buffer": self.slots.setdefault(root, len(self.slots)), "offset": value._address - root._address,
                    "dtype": None if value.dtype is None else value.dtype.name, "shape": list(value.shape)}
        if isinstance(value, Semaphore):
            return {"semaphore": self.semaphores.setdefault(value, len(self.semaphores))}
        if isinstance(value, tuple):
            return [self._value(one) for one in value]
        return value.item() if isinstance(value, np.generic) else value


# --- load ------------------------------------------------------------------------------------------------------------


def load(device: Device, path: str | Path, buffers: Mapping[str, Memory], semaphores: list[Semaphore]) -> Graph:
    """Make a graph of a file; see :meth:`maia_rt.Device.load_graph`."""
    header, images = _open(path)
    _require(device, path, header)
    programs: list[Program] = []
    try:
        bound = _bind(device, path, header, buffers)
        count = _field(header, "semaphores", int)
        if len(semaphores) != count:
            raise InvalidArgument(f"{path}: the graph takes {count} semaphores, not {len(semaphores)}")
        for image in images:
            programs.append(device.load(image))
        reader = _Reader(path, bound, semaphores, programs)
        builder = device.create_graph()
        reader.nodes(builder, _field(header, "nodes", list), 0)
        graph = builder.instantiate()
    except BaseException:
        for program in programs:
            program.close()
        raise
    graph._programs = tuple(programs)
    return graph


def _open(path: str | Path) -> tuple[dict[str, Any], list[bytes]]:
    """Read a file and check all that can be without a device."""
    file = Path(path)
    if file.stat().st_size > _MOST_BYTES:
        raise InvalidArgument(f"{path}: {file.stat().st_size:,} bytes are too many for a graph")
    data = file.read_bytes()
    if len(data) < _HEAD.size or data[:8] != MAGIC:
        raise InvalidArgument(f"{path} is no graph", hint="graph.save(path) writes one")
    _, version, size, digest = _HEAD.unpack_from(data)
    if version != VERSION:
        raise InvalidArgument(f"{path}: the file has version {version}, this driver reads {VERSION}",
                              hint="save the graph anew")
    rest = data[_HEAD.size:]
    if size > len(rest):
        raise InvalidArgument(f"{path}: the file is cut off: {len(rest)} bytes are left of {size} of its header")
    if hashlib.sha256(rest).digest() != digest:
        raise InvalidArgument(f"{path}: the checksum is wrong", cause="the file was cut off or changed",
                              hint="save the graph anew")
    try:
        header = json.loads(rest[:size])
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path}: the header is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise InvalidArgument(f"{path}: the header is no object")
    images, at = [], size
    for number, row in enumerate(_field(header, "programs", list)):
        length = _field(row, "bytes", int)
        image = rest[at:at + length] if length > 0 else b""
        if not image or len(image) != length or hashlib.sha256(image).hexdigest() != row.get("sha256"):
            raise InvalidArgument(f"{path}: program {number} is not what its checksum says")
        images.append(image)
        at += length
    return header, images


def _require(device: Device, path: str | Path, header: dict[str, Any]) -> None:
    """Check that the device offers what the graph needs."""
    contract = _field(header, "contract", list)
    offered = device.capabilities.contract
    if len(contract) != 2 or not all(type(part) is int for part in contract):
        raise InvalidArgument(f"{path}: the contract is {contract!r:.40}, not two numbers")
    if contract[0] != offered[0] or contract[1] > offered[1]:
        raise ContractMismatch(f"{path}: the graph was saved for contract {contract[0]}.{contract[1]}, {device.name} "
                               f"speaks {offered[0]}.{offered[1]}", hint="save the graph anew on that device")
    for need in _field(header, "needs", list):
        if need not in ("branch", "wait_value"):
            raise InvalidArgument(f"{path}: the graph needs {need!r:.40}, which this driver does not know")
        if not getattr(device.capabilities, need):
            raise Unsupported(f"{path}: the graph needs {need}, which {device.name} does not have")


def _bind(device: Device, path: str | Path, header: dict[str, Any], buffers: Mapping[str, Memory]) -> list[Memory]:
    bound = []
    names = [_field(row, "name", str) for row in _field(header, "buffers", list)]
    for name in buffers:
        if name not in names:
            raise InvalidArgument(f"{path}: the graph has no buffer {name!r:.80}",
                                  hint=f"it has {', '.join(names):.300}")
    for name, row in zip(names, header["buffers"], strict=True):
        if name not in buffers:
            raise InvalidArgument(f"{path}: the graph's buffer {name!r:.80} is not given",
                                  hint=f"it takes {', '.join(names):.300}")
        memory = _memory(buffers[name], name)
        device._require_open()
        needed, alignment = _field(row, "bytes", int), _field(row, "alignment", int)
        if memory.device is not device:
            raise InvalidArgument(f"{path}: buffer {name!r} belongs to another device")
        if memory.nbytes < needed:
            raise InvalidArgument(f"{path}: buffer {name!r} has {memory.nbytes} bytes, {needed} are needed")
        wanted = row.get("dtype")
        if wanted is not None and memory.dtype is not None and (
                memory.dtype != _dtype(wanted) or list(memory.shape) != row.get("shape")):
            raise InvalidArgument(f"{path}: buffer {name!r} is {memory.dtype} {memory.shape}, not {wanted} "
                                  f"{row.get('shape')!r:.80}",
                                  hint="pass memory of that dtype and shape, or plain bytes")
        if alignment < 1 or memory.address % alignment:
            raise InvalidArgument(f"{path}: buffer {name!r} is at {memory.address:#x}, not a multiple of {alignment}")
        bound.append(memory)
    return bound


class _Reader:
    """Builds nodes from the header's rows."""

    def __init__(self, path: str | Path, buffers: list[Memory], semaphores: list[Semaphore],
                 programs: list[Program]) -> None:
        self._path = path
        self._buffers = buffers
        self._semaphores = semaphores
        self._programs = programs
        self._count = 0

    def nodes(self, builder: GraphBuilder, rows: list[Any], depth: int) -> None:
        if depth > MAX_DEPTH:
            raise InvalidArgument(f"{self._path}: loops and conditions nest deeper than {MAX_DEPTH}")
        made: list[GraphNode] = []
        for row in rows:
            number, self._count = self._count, self._count + 1
            if number >= MAX_INDIRECT:
                raise InvalidArgument(f"{self._path}: the graph has more than {MAX_INDIRECT:,} nodes")
            try:
                node = self._node(builder, row, made, depth)
            except (MaiaError, KeyError) as error:
                if isinstance(error, MaiaError) and error.what.startswith(f"{self._path}: "):
                    raise
                what = error.what if isinstance(error, MaiaError) else str(error.args[0])
                raise InvalidArgument(f"{self._path}: node {number}: {what}") from None
            node.where = _field(row, "where", str)[:_LONGEST_TEXT]
            made.append(node)

    def _node(self, builder: GraphBuilder, row: Any, made: list[GraphNode], depth: int) -> GraphNode:
        do = _field(row, "do", str)
        after = [_at(made, number, "a node to come after") for number in _field(row, "after", list)]
        take: dict[str, Callable[[], GraphNode]] = {
            "copy": lambda: builder.copy(self._memory(row, "dst"), self._memory(row, "src"), after=after),
            "fill": lambda: builder.fill(self._memory(row, "dst"), _field(row, "value", int), _field(row, "width", int),
                                         after=after),
            "launch": lambda: builder.launch(self._kernel(row), *map(self._argument, _field(row, "args", list)),
                                             clusters=_field(row, "clusters", int), after=after),
            "write": lambda: builder.write_value(self._memory(row, "memory"), _field(row, "value", int), after=after),
            "signal": lambda: builder.signal(self._semaphore(row), _field(row, "value", int),
                                             op=_field(row, "op", str), after=after),
            "wait": lambda: self._wait(builder, row, after),
        }
        if do in take:
            return take[do]()
        if do not in ("loop", "condition"):
            raise InvalidArgument(f"there is no {do!r:.40} in this driver")
        memory = None if row.get("memory") is None else self._source(row)
        given = {"value": _field(row, "value", int), "condition": _field(row, "condition", str),
                 "mask": _field(row, "mask", int)}
        if do == "condition":
            body = builder.condition(self._source(row), after=after, **given)
        elif memory is None:
            body = builder.loop(_field(row, "count", int), after=after)
        else:
            body = builder.loop(while_=memory, after=after, **given)
        self.nodes(body, _field(row, "body", list), depth + 1)
        return body.node

    def _wait(self, builder: GraphBuilder, row: dict[str, Any], after: list[GraphNode]) -> GraphNode:
        if "semaphore" in row:
            return builder.wait(self._semaphore(row), _field(row, "value", int), op=_field(row, "op", str), after=after)
        return builder.wait_value(self._memory(row, "memory"), _field(row, "value", int), after=after,
                                  condition=_field(row, "condition", str), mask=_field(row, "mask", int))

    def _kernel(self, row: dict[str, Any]) -> Kernel:
        found = _field(row, "kernel", list)
        if len(found) != 2 or not isinstance(found[1], str):
            raise InvalidArgument("the kernel is not a program and a name")
        program: Program = _at(self._programs, found[0], "a program")
        return program[found[1]]

    def _semaphore(self, row: dict[str, Any]) -> Semaphore:
        found: Semaphore = _at(self._semaphores, _field(row, "semaphore", dict).get("semaphore"), "a semaphore")
        return found

    def _source(self, row: dict[str, Any]) -> Memory | Semaphore:
        """What a condition looks at."""
        found = _field(row, "memory", dict)
        if "semaphore" in found:
            return self._semaphore({"semaphore": found})
        return self._view(found)

    def _memory(self, row: dict[str, Any], name: str) -> Memory:
        return self._view(_field(row, name, dict))

    def _argument(self, value: Any) -> Any:
        return self._view(value) if isinstance(value, dict) else value

    def _view(self, row: dict[str, Any]) -> Memory:
        root: Memory = _at(self._buffers, row.get("buffer"), "a buffer")
        kind = row.get("dtype")
        shape, offset = tuple(_field(row, "shape", list)), _field(row, "offset", int)
        found: Memory = root.view(None if kind is None else _dtype(kind), shape, offset)
        return found


def _memory(memory: Any, name: str) -> Memory:
    if not isinstance(memory, Memory):
        raise InvalidType(f"buffer {name!r} is {type(memory).__name__}, not a Buffer or HostBuffer")
    return memory


def _field(row: Any, name: str, kind: type) -> Any:
    value = row.get(name) if isinstance(row, dict) else None
    if type(value) is not kind:
        raise InvalidArgument(f"{name} is {value!r:.40}, not {kind.__name__}")
    return value


def _at(things: list[Any], number: Any, what: str) -> Any:
    if type(number) is not int or not 0 <= number < len(things):
        raise InvalidArgument(f"{what} is number {number!r:.40}; there are {len(things)}")
    return things[number]


def _dtype(name: Any) -> np.dtype[Any]:
    if not isinstance(name, str) or not name.replace("_", "").isalnum():
        raise InvalidArgument(f"{name!r:.40} is no dtype")
    return check.dtype(name)
