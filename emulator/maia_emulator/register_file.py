"""The registers of BAR 0: values, the meaning of a write by access kind, and side effects by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from maia_emulator.fast_path import PLAIN_READ_4, PLAIN_READ_8, PLAIN_WRITE_4, PLAIN_WRITE_8, RegisterMemory
from maia_rt.contract.register import Register
from maia_rt.contract.registers import BAR0

BLOCK_BYTES: Final = 0x1000
"""The registers end below this offset."""

ReadEffect = Callable[[], int]
"""Returns the register's value at this moment."""
WriteEffect = Callable[[int, int], None]
"""Takes the written bits that may be written, and the rw bits as they were before."""


class RegisterFile:
    """Register values with the access kinds of the contract.

    Naturally aligned accesses of 4 bytes, and of 8 bytes to 64-bit registers, reach a register; every other access
    reads as zero and is ignored when written. A 64-bit register that acts when written is written as a whole.

    Parameters
    ----------
    constants : mapping of str to int
        Values by register name for what the contract calls "by profile"; they outlive a reset.
    table : mapping of str to Register
        The registers; those of the contract unless a test brings its own.
    """

    def __init__(self, constants: Mapping[str, int], table: Mapping[str, Register] = BAR0) -> None:
        self.memory = RegisterMemory(BLOCK_BYTES)
        self._table = dict(table)
        self._by_offset = {r.offset: r for r in table.values()}
        self._read_effects: dict[str, ReadEffect] = {}
        self._write_effects: dict[str, WriteEffect] = {}
        self._latched: dict[str, int] = {}
        # Sums over fields, taken once: every access needs some of them.
        self._masks = {r.name: _Masks(r) for r in table.values()}
        self._resets = {name: constants.get(name, r.reset) for name, r in table.items()}
        unknown = set(constants) - set(table)
        if unknown:
            raise ValueError(f"no such registers: {sorted(unknown)}")
        for register in table.values():
            self._mark(register)
        self.reset()

    def on_read(self, name: str, effect: ReadEffect) -> None:
        """Ask `effect` for the value of a register each time it is read."""
        self._read_effects[name] = effect
        self._mark(self._table[name])

    def on_write(self, name: str, effect: WriteEffect) -> None:
        """Call `effect` after each write to a register."""
        self._write_effects[name] = effect
        self._mark(self._table[name])

    def load(self, name: str) -> int:
        """Return a register's stored value."""
        register = self._table[name]
        return self.memory.load(register.offset, register.width_bytes)

    def store(self, name: str, value: int) -> None:
        """Store a register's value as hardware does: no access kind applies, no side effect follows."""
        register = self._table[name]
        self.memory.store(register.offset, register.width_bytes, value)

    def reset(self) -> None:
        """Return every register to its value after reset."""
        for name, value in self._resets.items():
            self.store(name, value)
        self._latched.clear()

    def read(self, offset: int, size: int) -> bytes:
        """Serve a read by software."""
        if size not in (4, 8) or offset % size:
            return bytes(size)
        register, low = self._at(offset)
        if register is None or size > register.width_bytes:
            return bytes(size)
        effect = self._read_effects.get(register.name)
        if effect is None:
            value = self.load(register.name)
        elif not low:
            # A counter's high half belongs to the low half that was read last.
            latched = self._latched.get(register.name)
            value = effect() if latched is None else latched << 32
        else:
            value = effect()
            self._latched[register.name] = value >> 32
        value &= self._masks[register.name].readable
        return (value if low else value >> 32).to_bytes(8, "little")[:size]

    def write(self, offset: int, data: bytes) -> None:
        """Serve a write by software."""
        size = len(data)
        if size not in (4, 8) or offset % size:
            return
        register, low = self._at(offset)
        if register is None or size > register.width_bytes:
            return
        masks = self._masks[register.name]
        if not masks.writable or (size < register.width_bytes and masks.acting):
            return
        covered = ((1 << 8 * size) - 1) << (0 if low else 32)
        written = int.from_bytes(data, "little") << (0 if low else 32)
        old = self.load(register.name)
        kept = masks.rw & covered
        cleared = masks.w1c & covered & written
        self.store(register.name, (old & ~kept | written & kept) & ~cleared)
        effect = self._write_effects.get(register.name)
        if effect is not None:
            effect(written & masks.writable, old & masks.rw)

    def _at(self, offset: int) -> tuple[Register | None, bool]:
        """The register at an offset, and whether the offset is its low half."""
        register = self._by_offset.get(offset)
        if register is not None:
            return register, True
        register = self._by_offset.get(offset - 4)
        if register is not None and register.width_bytes == 8:
            return register, False
        return None, False

    def _mark(self, register: Register) -> None:
        """Tell the fast path which accesses to a register have no side effect and need no mask."""
        wide = register.width_bytes == 8
        every = (1 << register.width_bits) - 1
        low = high = 0
        if register.name not in self._read_effects and not register.mask("wo", "pulse"):
            low |= PLAIN_READ_4 | (PLAIN_READ_8 if wide else 0)
            high |= PLAIN_READ_4
        if register.name not in self._write_effects and register.mask("rw") == every:
            low |= PLAIN_WRITE_4 | (PLAIN_WRITE_8 if wide else 0)
            high |= PLAIN_WRITE_4
        self.memory.set_plain(register.offset, low)
        if wide:
            self.memory.set_plain(register.offset + 4, high)


class _Masks:
    """The bits of a register by what software can do with them."""

    __slots__ = ("acting", "readable", "rw", "w1c", "writable")

    def __init__(self, register: Register) -> None:
        self.rw = register.mask("rw")
        self.w1c = register.mask("w1c")
        self.acting = register.mask("wo", "pulse")
        self.readable = register.mask("ro", "rw", "w1c")
        self.writable = register.mask("rw", "wo", "w1c", "pulse")
