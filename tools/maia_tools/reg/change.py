"""A write: what it would change, whether it may be made, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from maia_rt.errors import InvalidArgument
from maia_tools.reg import audit
from maia_tools.reg.access import Access
from maia_tools.reg.address import number
from maia_tools.reg.model import NEUTRAL_ONE, NEUTRAL_ZERO, UNAVOIDABLE, Field
from maia_tools.reg.place import Place

_COMPARED = frozenset({"rw"})
"""What reads back as it was written; of all other kinds the device decides."""


@dataclass(frozen=True)
class Change:
    """A write that has been thought through and not been made.

    Attributes
    ----------
    old : int or None
        None where the register cannot be read without an effect.
    touched : int
        The bits that were asked for.
    """

    place: Place
    old: int | None
    new: int
    touched: int

    def rows(self) -> Iterator[tuple[Field, int | None, int]]:
        """The fields that change or act, with the old value where it is known and the one to be written."""
        for field in self.place.register.fields if self.place.register is not None else ():
            old = None if self.old is None or not field.readable else field.get(self.old)
            new = field.get(self.new)
            touched = bool(field.mask & self.touched)
            if field.access == "rw":
                shown = old is None or old != new
            elif field.access in ("wo", "w1"):
                shown = touched
            elif field.access in NEUTRAL_ONE:
                shown = touched and new != (1 << field.width) - 1
            elif field.access in NEUTRAL_ZERO:
                shown = touched and new != 0
            else:
                shown = field.access in UNAVOIDABLE or (touched and old != new)
            if shown:
                yield field, old, new


def plan(access: Access, place: Place, value: int | str, mask: int | None = None) -> Change:
    """Think a write through; the register is read where that has no effect.

    Other fields keep what they hold. Those that clear, set or start something are written as to do nothing.

    Parameters
    ----------
    value : int or str
        A number; of a field a name too; of a register also ``FIELD=VALUE,FIELD=VALUE``.
    mask : int, optional
        Only these bits change.

    Raises
    ------
    InvalidArgument
        The value does not fit, or the write is refused without ``--unsafe``: read-only, not described, or it would
        have to read what reading changes.
    """
    _check_writable(access, place)
    bits, touched = _wanted(place, value, mask)
    register = place.register
    if not 0 <= bits < 1 << 8 * place.size:
        raise InvalidArgument(f"{value} does not fit the {8 * place.size} bits of {place.name}",
                              cause="it is too large or negative", hint=f"at most {place.hex(place.all_ones)}")
    whole = touched == place.all_ones
    old: int | None = None
    if register is None or (register.readable and not register.changed_by_reading) or (
            access.unsafe and register.readable and not whole):
        old = access.read_raw(place)
    elif not whole and register.readable:
        raise InvalidArgument(f"{place.full_name} is not written",
                              cause="a part of it changes by reading the rest, and reading this one changes it",
                              hint="write the whole register, or --unsafe")
    neutral = 0 if old is None else register.neutral(old) if register is not None else old
    return Change(place, old, neutral & ~touched | bits, touched)


def make(access: Access, change: Change) -> None:
    """Record a write and make it.

    Raises
    ------
    InvalidArgument
        The session is read-only.
    DevicePermission
        The record cannot be written, so nothing is.
    """
    place = change.place
    if not access.may_write:
        raise InvalidArgument(f"{place.full_name} is not written: this session only reads",
                              cause="it was started without --write", hint="start it with --write")
    facts = {"device": access.name, "source": access.source, "name": place.full_name, "address": place.address,
             "old": None if change.old is None else place.hex(change.old), "new": place.hex(change.new)}
    audit.record(access.audit, **facts)
    try:
        for at in range(0, place.size, place.access_size):
            part = change.new >> 8 * at & (1 << 8 * place.access_size) - 1
            access.transport.write(place.space.region, place.offset + at, place.access_size, part)
    except BaseException as error:
        audit.record(access.audit, **facts, failed=f"{type(error).__name__}: {error}")
        raise


def verify(access: Access, change: Change) -> tuple[int, list[str]]:
    """Read a written register back: its value, and a line for each rw field that holds something else.

    Raises
    ------
    InvalidArgument
        It cannot be read without an effect.
    """
    place = change.place
    after = access.read(Place(place.space, place.offset, place.size, place.access_size, place.register, place.indexes))
    if place.register is None or not place.register.fields:
        same = after == change.new
        return after, [] if same else [f"{place.name}: wrote {place.hex(change.new)}, reads {place.hex(after)}"]
    return after, [f"{place.name}.{f.name}: wrote {f.text(f.get(change.new))}, reads {f.text(f.get(after))}"
                   for f in place.register.fields if f.access in _COMPARED and f.get(change.new) != f.get(after)]


def _check_writable(access: Access, place: Place) -> None:
    if access.unsafe:
        return
    target = place.field or place.register
    if target is not None and not target.writable:
        raise InvalidArgument(f"{place.full_name} is read-only", cause=f"its access kind is {target.access}",
                              hint="--unsafe writes it all the same")
    if place.register is None:
        known = [r.name_at(i) for r, i in place.space.covering(place.offset, place.size)]
        raise InvalidArgument(f"no register is described at {place.address} with {place.size} bytes",
                              cause=f"{', '.join(known)} lies there" if known else "nothing is known of it",
                              hint="--unsafe writes it all the same"
                              + (", or write the register by name" if known else ""))


def _wanted(place: Place, value: int | str, mask: int | None) -> tuple[int, int]:
    """The bits to write, in place, and which of the register's are meant."""
    if place.field is not None:
        if mask is not None:
            raise InvalidArgument(f"{place.full_name} is a field, and a field is its own mask",
                                  cause="the mask is of a register's bits",
                                  hint="leave --mask out")
        return _field_bits(place, place.field, value) << place.field.lsb, place.field.mask
    if isinstance(value, str) and "=" in value:
        if mask is not None:
            raise InvalidArgument("fields by name and --mask exclude each other", cause="a field is its own mask",
                                  hint="leave --mask out")
        bits = touched = 0
        for item in value.split(","):
            name, _, text = item.partition("=")
            field = place.register.find(name.strip()) if place.register is not None else None
            if field is None:
                known = ", ".join(f.name for f in place.register.fields) if place.register is not None else ""
                raise InvalidArgument(f"{place.name} has no field {name.strip()}", cause="its fields are other ones",
                                      hint=known or "a number for the whole register")
            bits |= _field_bits(place, field, text.strip()) << field.lsb
            touched |= field.mask
        return bits, touched
    bits = number(value) if isinstance(value, str) else int(value)
    if mask is None:
        return bits, place.all_ones
    if not 0 < mask <= place.all_ones:
        raise InvalidArgument(f"the mask {mask:#x} does not fit the {8 * place.size} bits of {place.name}",
                              cause="it is 0 or too large", hint=f"at most {place.hex(place.all_ones)}")
    if bits & ~mask:
        raise InvalidArgument(f"{bits:#x} has bits outside of the mask {mask:#x}", cause="they would not be written",
                              hint=f"{bits & mask:#x}")
    return bits, mask


def _field_bits(place: Place, field: Field, value: int | str) -> int:
    if isinstance(value, str):
        for bits, (name, _) in field.names.items():
            if name.lower() == value.lower():
                return bits
        try:
            value = number(value)
        except InvalidArgument:
            known = ", ".join(name for name, _ in field.names.values())
            raise InvalidArgument(f"{value!r} is no value of {place.name}.{field.name}",
                                  cause="it is neither a number nor one of the field's names",
                                  hint=known or "decimal or 0x...") from None
    if not 0 <= value < 1 << field.width:
        raise InvalidArgument(f"{value} does not fit the {field.width} bits of {place.name}.{field.name}",
                              cause="it is too large or negative", hint=f"at most {(1 << field.width) - 1:#x}")
    return int(value)
