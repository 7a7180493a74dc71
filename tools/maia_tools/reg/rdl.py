"""Registers from a SystemRDL file: arrays, register files, enums, access kinds and side effects of reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maia_rt.errors import InvalidArgument, Unsupported
from maia_tools.reg.model import Field, Register, Segment

if TYPE_CHECKING:
    from systemrdl.node import FieldNode, MemNode, Node, RegNode

MOST_MESSAGES = 3
WORD = 8
"""Bytes of one access to a memory, at most."""


def load(path: str, top: str | None = None, *, base: int = 0) -> list[Register]:
    """Compile a file and return its registers.

    Parameters
    ----------
    path : str
    top : str, optional
        The address map to take; by default the file's last one.
    base : int
        Where the map starts in its region, in bytes.

    Raises
    ------
    Unsupported
        systemrdl-compiler is not installed, or the map is big-endian.
    InvalidArgument
        The file cannot be read or has errors; their first lines are in the text.
    """
    try:
        from systemrdl.compiler import RDLCompiler
        from systemrdl.messages import MessagePrinter, RDLCompileError
    except ImportError:
        raise Unsupported("this Python cannot read SystemRDL", cause="the package systemrdl-compiler is not installed",
                          hint="pip install 'maia-rt[rdl]'") from None
    if not os.path.isfile(path):
        raise InvalidArgument(f"there is no RDL file {path!r}", cause="it has another name",
                              hint="--rdl FILE or --rdl FILE:TOP")

    said: list[str] = []

    class Messages(MessagePrinter):
        def print_message(self, severity: Any, text: str, src_ref: Any) -> None:
            line = getattr(src_ref, "line", None)
            said.append(f"{Path(path).name}{f':{line}' if line else ''}: {text}")

    compiler = RDLCompiler(message_printer=Messages())
    try:
        compiler.compile_file(path)
        root = compiler.elaborate(top_def_name=top)
    except RDLCompileError:
        raise InvalidArgument(f"{path} is not an RDL file that compiles", cause="; ".join(said[:MOST_MESSAGES]),
                              hint="correct the file" if not top else "correct the file, or name another TOP") from None
    found: list[Register] = []
    _walk(root.top, (), base, found)
    if not found:
        raise InvalidArgument(f"the address map {root.top.inst_name} of {path} has no registers",
                              cause="they are in another one of the file",
                              hint="name another one: --rdl FILE:TOP")
    return sorted(found, key=lambda r: r.offset)


def _walk(parent: Node, outer: tuple[Segment, ...], base: int, found: list[Register]) -> None:
    from systemrdl.node import AddrmapNode, MemNode, RegfileNode, RegNode

    if isinstance(parent, AddrmapNode) and parent.get_property("bigendian"):
        raise Unsupported(f"the address map {parent.inst_name} is big-endian",
                          cause="its registers' bytes are swapped on the way",
                          hint="describe the registers as the little-endian host sees them")
    for node in parent.children(unroll=False):
        if not isinstance(node, AddrmapNode | RegfileNode | RegNode | MemNode):
            continue
        at = base + node.raw_address_offset
        segments = (*outer, Segment(node.inst_name, _dimensions(node)))
        if isinstance(node, RegNode):
            found.append(_register(node, segments, at))
        elif isinstance(node, MemNode):
            found.append(_memory(node, segments, at))
        else:
            _walk(node, segments, at, found)


def _dimensions(node: Any) -> tuple[tuple[int, int], ...]:
    if not node.is_array:
        return ()
    found: list[tuple[int, int]] = []
    stride = node.array_stride
    for count in reversed(node.array_dimensions):
        found.insert(0, (count, stride))
        stride *= count
    return tuple(found)


def _text(node: Node) -> str:
    return " ".join(str(node.get_property("desc") or node.get_property("name", default="") or "").split())


def _register(node: RegNode, segments: tuple[Segment, ...], offset: int) -> Register:
    fields = tuple(_field(f) for f in sorted(node.fields(), key=lambda f: f.low))
    return Register(segments, offset, node.get_property("regwidth") // 8, fields, _text(node),
                    access_size=min(node.get_property("accesswidth") // 8, 8))


def _memory(node: MemNode, segments: tuple[Segment, ...], offset: int) -> Register:
    """A memory is an array of its entries; entries wider than a word are arrays of words."""
    from systemrdl.rdltypes import AccessType  # type: ignore[attr-defined]

    size = -(-node.get_property("memwidth") // 8)
    word = min(size, WORD)
    dimensions = [(node.get_property("mementries"), size)]
    if size > word:
        dimensions.append((size // word, word))
    *outer, last = segments
    access = "ro" if node.get_property("sw") == AccessType.r else "rw"
    return Register((*outer, Segment(last.name, (*last.dimensions, *dimensions))), offset, word,
                    (Field("data", 0, 8 * word, access),), _text(node))


def _field(node: FieldNode) -> Field:
    on_read = {"rclr": "clear", "rset": "set", "ruser": "other"}
    reading = node.get_property("onread")
    reset = node.get_property("reset")
    encode = node.get_property("encode")
    names = {int(m.value): (m.name, m.rdl_desc or "") for m in encode} if encode is not None else {}
    return Field(node.inst_name, node.low, node.width, _access(node), reset if isinstance(reset, int) else None,
                 _text(node), on_read[reading.name] if reading is not None else "", names=names)


def _access(node: FieldNode) -> str:
    if node.get_property("singlepulse"):
        return "pulse"
    kind = {"na": "na", "r": "ro", "w": "wo", "rw": "rw", "rw1": "rw1", "w1": "w1"}[node.get_property("sw").name]
    writing = node.get_property("onwrite")
    if kind in ("ro", "na") or writing is None:
        return kind
    if kind == "wo" and writing.name in ("woclr", "woset", "wot"):
        return kind
    return {"woclr": "w1c", "woset": "w1s", "wot": "w1t", "wzc": "w0c", "wzs": "w0s", "wzt": "w0t",
            "wclr": "wclr", "wset": "wset", "wuser": "wuser"}[writing.name]
