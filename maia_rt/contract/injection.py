"""Faults on purpose: an :class:`Injection`, its text and its 56 bytes, one place for driver, emulator and tools."""

from __future__ import annotations

import dataclasses
import numbers
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from maia_rt.contract.commands import (
    ANY_QUEUE,
    INJECT_DRAWN,
    INJECT_ENDS,
    INJECT_NOW,
    INJECTION,
    InjectionKind,
    Opcode,
)
from maia_rt.errors import FaultCode, InvalidArgument, InvalidType

CORRUPTIBLE: Final = frozenset({Opcode.COPY, Opcode.COPY_ND, Opcode.FILL, Opcode.WRITE_IMM})
"""Commands whose result CORRUPT can flip a bit of."""
LONGEST_DELAY_NS: Final = 10**12

_U32: Final = 0xFFFFFFFF
_U64: Final = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Injection:
    """One fault on purpose: what happens, and to which commands.

    A command that matches `queue`, `opcodes` and `sequence` is counted, for each queue by itself. The first `after`
    matches are let through; of the others each `every`-th is struck, with `probability`.

    Parameters
    ----------
    kind : InjectionKind or str
        ``fault``, ``delay``, ``hang``, ``corrupt``, ``firmware`` or ``gone``.
    code : FaultCode or str
        ``fault``: what the command fails with; needed.
    address : int
        ``fault``: the address that is told, 0 for none.
    delay_ns : int
        ``delay``: how much later the command starts, in nanoseconds; needed.
    bit : int, optional
        ``corrupt``: which bit of the bytes written is flipped, modulo their number; the seed draws it by default.
    ends : bool
        ``firmware``: it says that it failed, instead of falling silent. ``gone``: the emulator ends the connection.
    now : bool
        ``firmware`` and ``gone``: at once, not at a command.
    queue : int, optional
        Only commands of this hardware queue; any by default.
    opcodes : iterable of Opcode or str
        Only these; empty for all that `kind` can strike.
    sequence : int, optional
        Only the command with this sequence number, and of a list all its commands.
    after, every : int
        See above.
    times : int, optional
        How often it strikes, over all queues; 0 has no end. By default once, but without end where `every` or
        `probability` say that it shall come again.
    probability : float
        Above 0, at most 1; kept in units of 2^-32.
    seed : int, optional
        Where probability and bits are drawn from. None: whoever arms it chooses one, and tells it.

    Raises
    ------
    InvalidArgument, InvalidType
        A value is not possible, or the kind has no use for it.

    Examples
    --------
    >>> from maia_rt.contract.injection import Injection
    >>> str(Injection("fault", code="ECC", opcodes=["COPY"], after=3))
    'fault:code=ECC,opcodes=COPY,after=3'
    >>> Injection.parse("delay:ms=2,probability=0.5,seed=7").delay_ns
    2000000
    """

    kind: InjectionKind
    code: FaultCode = FaultCode.NONE
    address: int = 0
    delay_ns: int = 0
    bit: int | None = None
    ends: bool = False
    now: bool = False
    queue: int | None = None
    opcodes: frozenset[Opcode] = frozenset()
    sequence: int | None = None
    after: int = 0
    every: int = 1
    times: int | None = None
    probability: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        self._set(kind=_member(InjectionKind, self.kind, "kind"), code=_member(FaultCode, self.code, "code"),
                  opcodes=_opcodes(self.opcodes))
        for name, least, most in _LIMITS:
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                self._set(**{name: _integer(name, value, least, most)})
        for name in ("ends", "now"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise InvalidType(f"{name} is {type(getattr(self, name)).__name__}, not bool")
        self._set(probability=_share("probability", self.probability))
        if self.times is None:
            self._set(times=1 if self.every == 1 and self.probability == 1 else 0)
        self._check_kind()

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_kind(self) -> None:
        kind, name = self.kind, self.kind.name.lower()
        uses = _USES[kind]
        for field in ("code", "address", "delay_ns", "bit", "ends", "now"):
            if getattr(self, field) != _DEFAULTS[field] and field not in uses:
                raise InvalidArgument(f"{name} has no use for {_TEXT_NAMES.get(field, field)}",
                                      hint=f"it takes {', '.join(sorted(uses)) or 'nothing of its own'}")
        if kind is InjectionKind.FAULT and self.code is FaultCode.NONE:
            raise InvalidArgument("a fault needs a code", hint="such as code=ECC; the codes are those of FaultCode")
        if kind is InjectionKind.DELAY and not self.delay_ns:
            raise InvalidArgument("a delay needs a time", hint="such as us=50")
        if kind is InjectionKind.CORRUPT and not self.opcodes <= CORRUPTIBLE:
            unfit = ", ".join(sorted(op.name for op in self.opcodes - CORRUPTIBLE))
            raise InvalidArgument(f"corrupt has nothing to flip in {unfit}",
                                  hint=f"it can strike {', '.join(op.name for op in sorted(CORRUPTIBLE))}")
        if self.now:
            where = ("queue", "opcodes", "sequence", "after", "every", "probability", "times")
            for field in where:
                if getattr(self, field) != (1 if field == "times" else _DEFAULTS[field]):
                    raise InvalidArgument(f"now and {field} exclude each other",
                                          cause="it strikes at once, not at a command")

    # --- text --------------------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, spec: str) -> Injection:
        """Read a SPEC: ``KIND``, or ``KIND:KEY=VALUE,FLAG,...``.

        Keys are those of :class:`Injection`, with ``ns``, ``us``, ``ms`` or ``s`` for the delay; opcodes are joined
        by ``+``; the flags are ``now`` and ``ends``. Integers may be written as 0x... Case does not matter.

        Raises
        ------
        InvalidArgument
            The text says what is wrong with which part.
        """
        if not isinstance(spec, str):
            raise InvalidType(f"a SPEC is text, not {type(spec).__name__}")
        head, colon, tail = spec.strip().partition(":")
        values: dict[str, Any] = {}
        try:
            for part in tail.split(",") if colon else ():
                key, equals, text = (piece.strip() for piece in part.partition("="))
                name, value = _read_part(key.lower(), text if equals else None)
                if name in values:
                    raise InvalidArgument(f"{key} comes twice")
                values[name] = value
            return cls(_member(InjectionKind, head.strip(), "kind"), **values)
        except InvalidArgument as error:
            raise InvalidArgument(f"{spec!r}: {error.what}", cause=error.cause,
                                  hint=error.hint or "such as fault:code=ECC,opcodes=COPY,after=3") from None

    def __str__(self) -> str:
        """Return the SPEC; :meth:`parse` of it is equal."""
        parts = []
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            if field.name == "times":
                again = self.every != 1 or self.probability != 1
                if value != (0 if again else 1):
                    parts.append(f"times={value}")
            elif value == field.default:
                continue
            elif isinstance(value, bool):
                parts.append(field.name)
            elif field.name == "code":
                parts.append(f"code={value.name}")
            elif field.name == "address":
                parts.append(f"address={value:#x}")
            elif field.name == "opcodes":
                parts.append("opcodes=" + "+".join(op.name for op in sorted(value)))
            else:
                parts.append(f"{_TEXT_NAMES.get(field.name, field.name)}={value}")
        return self.kind.name.lower() + (":" + ",".join(parts) if parts else "")

    # --- bytes -------------------------------------------------------------------------------------------------------

    def pack(self) -> bytes:
        """Return the INJECTION structure, 56 bytes. A seed of None is 0."""
        row = np.zeros((), INJECTION)
        drawn = self.kind is InjectionKind.CORRUPT and self.bit is None
        row["kind"], row["code"] = self.kind, self.code
        row["flags"] = INJECT_NOW * self.now | INJECT_ENDS * self.ends | INJECT_DRAWN * drawn
        row["opcodes"] = sum(1 << op for op in self.opcodes)
        row["queue"] = ANY_QUEUE if self.queue is None else self.queue
        row["after"], row["every"], row["times"] = self.after, self.every, self.times or 0
        row["probability"] = round(self.probability * 2**32) & _U32
        row["sequence"], row["seed"] = self.sequence or 0, self.seed or 0
        row["value"] = self.address or self.delay_ns or self.bit or 0
        return row.tobytes()

    @classmethod
    def unpack(cls, raw: bytes) -> Injection:
        """Read an INJECTION structure.

        Raises
        ------
        InvalidArgument
            A field holds what it may not have.
        """
        if len(raw) != INJECTION.itemsize:
            raise InvalidArgument(f"an INJECTION has {INJECTION.itemsize} bytes, not {len(raw)}")
        row = np.frombuffer(raw, INJECTION)[0]
        kind = _member(InjectionKind, int(row["kind"]), "kind")
        flags, opcodes, value = int(row["flags"]), int(row["opcodes"]), int(row["value"])
        if flags & ~(INJECT_NOW | INJECT_ENDS | INJECT_DRAWN) or int(row["reserved0"]):
            raise InvalidArgument("a reserved field is not zero")
        if opcodes >> max(Opcode) + 1 or opcodes & 1:
            raise InvalidArgument(f"opcodes {opcodes:#x} has bits that are no opcodes")
        if flags & INJECT_DRAWN and (value or kind is not InjectionKind.CORRUPT):
            raise InvalidArgument("only a bit of CORRUPT is drawn")
        fields: dict[str, Any] = {}
        if kind is InjectionKind.FAULT:
            fields["address"] = value
        elif kind is InjectionKind.DELAY:
            fields["delay_ns"] = value
        elif kind is InjectionKind.CORRUPT:
            fields["bit"] = None if flags & INJECT_DRAWN else value
        elif value:
            raise InvalidArgument(f"{kind.name} has no value")
        queue = int(row["queue"])
        return cls(
            kind, _member(FaultCode, int(row["code"]), "code"), ends=bool(flags & INJECT_ENDS),
            now=bool(flags & INJECT_NOW), queue=None if queue == ANY_QUEUE else queue,
            opcodes=frozenset(op for op in Opcode if opcodes >> op & 1), sequence=int(row["sequence"]) or None,
            after=int(row["after"]), every=int(row["every"]), times=int(row["times"]),
            probability=int(row["probability"]) / 2**32 or 1.0, seed=int(row["seed"]), **fields)


_LIMITS: Final = (
    ("address", 0, _U64), ("delay_ns", 0, LONGEST_DELAY_NS), ("bit", 0, _U64), ("queue", 0, 0xFFFF),
    ("sequence", 1, _U64), ("after", 0, _U32), ("every", 1, _U32), ("times", 0, _U32), ("seed", 0, _U64),
)
_OPTIONAL: Final = frozenset({"bit", "queue", "sequence", "times", "seed"})
_DEFAULTS: Final[dict[str, Any]] = {field.name: field.default for field in dataclasses.fields(Injection)}
_USES: Final = {
    InjectionKind.FAULT: {"code", "address"}, InjectionKind.DELAY: {"delay_ns"}, InjectionKind.HANG: set[str](),
    InjectionKind.CORRUPT: {"bit"}, InjectionKind.FIRMWARE: {"ends", "now"}, InjectionKind.GONE: {"ends", "now"},
}
_TEXT_NAMES: Final = {"delay_ns": "ns"}
_UNITS_NS: Final = {"ns": 1, "us": 1000, "ms": 10**6, "s": 10**9}
_FLAGS: Final = ("now", "ends")


def _member(kind: Any, value: Any, what: str) -> Any:
    """A member of an enumeration by itself, by number or by name."""
    if isinstance(value, str):
        found = kind.__members__.get(value.upper())
        if found is None:
            names = ", ".join(m.name.lower() if kind is InjectionKind else m.name for m in kind if m)
            raise InvalidArgument(f"there is no {what} {value!r}", hint=f"one of {names}")
        return found
    if isinstance(value, bool):
        raise InvalidType(f"{what} is a bool")
    try:
        return kind(operator.index(value))
    except TypeError:
        raise InvalidType(f"{what} is {type(value).__name__}, not a {kind.__name__} or its name") from None
    except ValueError:
        raise InvalidArgument(f"there is no {what} {value}") from None


def _opcodes(value: Any) -> frozenset[Opcode]:
    if isinstance(value, (str, int)) or not isinstance(value, Iterable):
        raise InvalidType(f"opcodes is {type(value).__name__}, not a set of Opcode", hint="write opcodes=[...]")
    return frozenset(_member(Opcode, one, "opcode") for one in value)


def _integer(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool):
        raise InvalidType(f"{name} is a bool, not an integer")
    try:
        number = operator.index(value)
    except TypeError:
        raise InvalidType(f"{name} is {type(value).__name__}, not an integer") from None
    if not least <= number <= most:
        raise InvalidArgument(f"{_TEXT_NAMES.get(name, name)} is {least} to {most}, not {number}")
    return number


def _share(name: str, value: Any) -> float:
    """A probability as the device keeps it, so that what is printed is what happens."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidType(f"{name} is {type(value).__name__}, not a number")
    share = float(value)
    if not 0 < share <= 1:
        raise InvalidArgument(f"{name} is above 0 and at most 1, not {value}")
    return max(round(share * 2**32), 1) / 2**32


def _read_part(key: str, text: str | None) -> tuple[str, Any]:
    """One ``KEY=VALUE`` or flag of a SPEC, as a field's name and value."""
    if key in _FLAGS:
        if text is not None:
            raise InvalidArgument(f"{key} takes no value")
        return key, True
    if key in _UNITS_NS:
        time = _number(key, text, float) * _UNITS_NS[key]
        if not 0 <= time <= LONGEST_DELAY_NS:
            raise InvalidArgument(f"a delay is 0 to {LONGEST_DELAY_NS // 10**9} s, not {text}{key}")
        return "delay_ns", round(time)
    if key not in _DEFAULTS or key in ("kind", "delay_ns"):
        known = ", ".join(sorted({*_DEFAULTS, *_UNITS_NS} - {"kind", "delay_ns"}))
        raise InvalidArgument(f"there is no key {key!r}", hint=f"one of {known}")
    if not text:
        raise InvalidArgument(f"{key} needs a value")
    if key == "code":
        return key, text
    if key == "opcodes":
        return key, [one.strip() for one in text.split("+")]
    return key, _number(key, text, float if key == "probability" else lambda number: int(number, 0))


def _number(key: str, text: str | None, read: Callable[[str], Any]) -> Any:
    try:
        return read(text or "")
    except ValueError:
        raise InvalidArgument(f"{key} is no number: {text!r}") from None
