"""Injections as text, as bytes and as objects: what is good comes back as it was, what is not is told."""

import numpy as np
import pytest

from maia_rt.contract.commands import INJECTION, InjectionKind, Opcode
from maia_rt.contract.injection import Injection
from maia_rt.errors import FaultCode, InvalidArgument, InvalidType

SPECS = {
    "fault:code=ECC": Injection(InjectionKind.FAULT, FaultCode.ECC),
    "fault:code=LINK,address=0x1000000,queue=3,opcodes=COPY+LAUNCH,sequence=17": Injection(
        "fault", "link", address=0x1000000, queue=3, opcodes=["launch", Opcode.COPY], sequence=17),
    "fault:code=TRAP,after=3,every=2,times=7,probability=0.25,seed=9": Injection(
        "fault", 10, after=3, every=2, times=7, probability=0.25, seed=9),
    "delay:ns=50000": Injection("DELAY", delay_ns=50_000),
    "hang:opcodes=LAUNCH": Injection("hang", opcodes={Opcode.LAUNCH}),
    "corrupt:bit=0": Injection("corrupt", bit=0),
    "corrupt": Injection(InjectionKind.CORRUPT),
    "firmware:ends,now": Injection("firmware", ends=True, now=True),
    "gone:after=100,times=0": Injection("gone", after=100, times=0),
}


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_is_read_and_printed_as_it_was(spec):
    injection = Injection.parse(spec)
    assert injection == SPECS[spec]
    assert str(injection) == spec


@pytest.mark.parametrize("spec", SPECS)
def test_its_bytes_come_back_as_the_same_injection(spec):
    injection = Injection.parse(spec)
    raw = injection.pack()
    assert len(raw) == INJECTION.itemsize == 56
    back = Injection.unpack(raw)
    assert back.pack() == raw
    assert str(back).replace(",seed=0", "").replace(":seed=0", "") == spec


def test_case_units_and_blanks_are_the_readers_choice():
    assert Injection.parse(" Delay: US = 1.5 ").delay_ns == 1500
    assert Injection.parse("delay:ms=2").delay_ns == 2_000_000
    assert Injection.parse("delay:s=1e0").delay_ns == 10**9
    assert Injection.parse("FAULT:CODE=ecc,opcodes=copy + fill").opcodes == {Opcode.COPY, Opcode.FILL}
    assert Injection.parse("fault:code=ECC,seed=0xff").seed == 255


def test_once_unless_it_says_that_it_comes_again():
    assert Injection("hang").times == 1
    assert Injection("hang", every=2).times == Injection("hang", probability=0.5).times == 0
    assert Injection("hang", times=0).times == 0


@pytest.mark.parametrize(("spec", "says"), [
    ("", "there is no kind ''"), ("quake", "there is no kind 'quake'.*one of fault, delay"), (":", "there is no key"),
    ("fault", "a fault needs a code"), ("fault:code=NONE", "needs a code"), ("fault:code=OOPS", "there is no code"),
    ("fault:code=", "code needs a value"), ("fault:code", "code needs a value"), ("hang:", "there is no key ''"),
    ("fault:code=ECC,code=LINK", "code comes twice"), ("delay", "a delay needs a time"), ("delay:ns=0", "needs a time"),
    ("delay:us=1,ms=1", "ms comes twice"), ("delay:us=-1", "a delay is 0 to 1000 s"), ("delay:s=1e30", "a delay is"),
    ("delay:s=nan", "a delay is"), ("delay:s=soon", "s is no number: 'soon'"),
    ("delay:ns=5,code=ECC", "no use for code"),
    ("hang:bit=3", "hang has no use for bit"), ("hang:now", "hang has no use for now"),
    ("corrupt:opcodes=LAUNCH", "nothing to flip in LAUNCH"), ("corrupt:bit=-1", "bit is 0 to"),
    ("hang:opcodes=COPY+DANCE", "there is no opcode 'DANCE'"), ("hang:opcodes=", "opcodes needs a value"),
    ("hang:opcodes=+", "there is no opcode ''"), ("hang:queue=x", "queue is no number"),
    ("hang:queue=-1", "queue is 0 to 65535, not -1"), ("hang:queue=65536", "queue is 0"), ("hang:after=-1", "after is"),
    ("hang:every=0", "every is 1 to"), ("hang:times=4294967296", "times is 0 to"), ("hang:sequence=0", "sequence is 1"),
    ("hang:probability=0", "probability is above 0"), ("hang:probability=1.5", "above 0 and at most 1"),
    ("hang:probability=nan", "above 0"), ("hang:seed=1.5", "seed is no number"), ("hang:seed=-1", "seed is 0 to"),
    ("gone:now=1", "now takes no value"), ("gone:now,queue=1", "now and queue exclude each other"),
    ("gone:now,times=2", "now and times exclude"), ("hang:colour=red", "there is no key 'colour'.*one of address"),
    ("hang:kind=fault", "there is no key 'kind'"), ("hang:delay_ns=4", "there is no key 'delay_ns'"),
    ("fault:code=ECC,,after=1", "there is no key ''"), ("fault;code=ECC", "there is no kind"),
])
def test_a_bad_spec_is_refused_with_what_is_wrong(spec, says):
    with pytest.raises(InvalidArgument, match=says) as caught:
        Injection.parse(spec)
    assert repr(spec) in str(caught.value) and caught.value.hint


@pytest.mark.parametrize(("kwargs", "error", "says"), [
    ({"kind": None}, InvalidType, "kind is NoneType"), ({"kind": 99}, InvalidArgument, "there is no kind 99"),
    ({"kind": True}, InvalidType, "bool"), ({"kind": "hang", "opcodes": "COPY"}, InvalidType, "opcodes is str"),
    ({"kind": "hang", "opcodes": 3}, InvalidType, "opcodes is int"),
    ({"kind": "hang", "opcodes": [None]}, InvalidType, "opcode is NoneType"),
    ({"kind": "hang", "after": 1.0}, InvalidType, "after is float"),
    ({"kind": "hang", "after": None}, InvalidType, "after is NoneType"),
    ({"kind": "hang", "every": True}, InvalidType, "every is a bool"),
    ({"kind": "hang", "probability": "1"}, InvalidType, "probability is str"),
    ({"kind": "hang", "probability": 1j}, InvalidType, "probability is complex"),
    ({"kind": "gone", "now": 1}, InvalidType, "now is int"), ({"kind": "fault", "code": 999}, InvalidArgument, "999"),
    ({"kind": "fault", "code": "ECC", "address": 1 << 64}, InvalidArgument, "address is 0 to"),
])
def test_a_value_that_is_none_is_refused(kwargs, error, says):
    with pytest.raises(error, match=says):
        Injection(**kwargs)


def test_a_spec_is_text():
    with pytest.raises(InvalidType, match="a SPEC is text, not int"):
        Injection.parse(3)


HOSTILE = {
    "kind": [0, 7, 255], "flags": [8, 255], "code": [0, 999], "opcodes": [1, 1 << 31], "every": [0], "reserved0": [1],
    "probability": [], "queue": [0x10000],
}


@pytest.mark.parametrize("field", HOSTILE)
def test_hostile_bytes_are_refused(field):
    good = bytearray(Injection("fault", "ECC").pack())
    dtype, at = INJECTION.fields[field][:2]
    for value in HOSTILE[field]:
        bad = bytearray(good)
        bad[at : at + dtype.itemsize] = value.to_bytes(dtype.itemsize, "little")
        with pytest.raises(InvalidArgument):
            Injection.unpack(bytes(bad))
    with pytest.raises(InvalidArgument, match="56 bytes, not 55"):
        Injection.unpack(bytes(good[:-1]))


def test_a_value_where_the_kind_has_none_is_refused():


    row = np.frombuffer(bytearray(Injection("hang").pack()), INJECTION)
    row["value"] = 1
    with pytest.raises(InvalidArgument, match="HANG has no value"):
        Injection.unpack(row.tobytes())
    row["value"], row["flags"] = 0, 4
    with pytest.raises(InvalidArgument, match="only a bit of CORRUPT"):
        Injection.unpack(row.tobytes())
