"""``maia reg`` and values of all ones: a device that is gone is told from a register that holds them."""

import pytest
from helpers.served import Served

from maia_rt.contract.registers import BAR0

pytestmark = pytest.mark.emulator_process


@pytest.fixture
def served(tmp_path_factory):
    device = Served(str(tmp_path_factory.mktemp("s") / "s"))
    yield device
    device.close()


def silence(served, *, but=None):
    """BAR 0 answers as the host bridge does for a device that is gone; `but` is a register that still answers."""
    bar = served.function.regions[0]
    real = bar.read
    for name, register in BAR0.items():
        if register.readable and name != but:
            served.keep(name, 0)  # not from the memory of plain registers, past the region
    bar.read = lambda offset, size: (
        real(offset, size) if but is not None and offset == BAR0[but].offset else b"\xff" * size)


def test_a_register_that_holds_all_ones_is_shown_as_any_other(served, run_maia):
    served.keep("SCRATCH", 0xFFFFFFFF)
    done = run_maia("reg", "read", "scratch", "-d", served.path)
    assert done.returncode == 0, done.stderr
    assert "0xffffffff" in done.stdout


@pytest.mark.parametrize("arguments", [
    ["read", "scratch"], ["read", "bar4:0x0"], ["walk"], ["dump"], ["watch", "status", "-n", "1"],
    ["write", "scratch", "1", "-y"],
])
def test_a_device_that_reads_as_all_ones_is_lost(served, run_maia, arguments):
    silence(served)
    if arguments[-1] == "bar4:0x0":
        served.function.regions[4].write(0, b"\xff" * 4)
    done = run_maia("reg", *arguments, "-d", served.path)
    assert done.returncode == 5, done.stderr
    assert "other registers read as all ones" in done.stderr
    assert done.stderr.count("\n") >= 3
    assert "try: maia reg read 'config.*'" in done.stderr


def test_one_other_register_that_answers_shows_that_the_device_lives(served, run_maia):
    silence(served, but="VERSION")
    assert run_maia("reg", "read", "scratch", "-d", served.path).returncode == 0


def test_disabled_memory_space_and_sleep_are_named_as_the_cause(served, run_maia, tmp_path):
    silence(served)
    lines = "write config.{} -y\nread scratch\n"
    for change, said in (("command.memory_space 0", "memory_space is 0"), ("pm.control.state D3hot", "state D3")):
        done = run_maia("reg", "shell", "--write", "-d", served.path, "--audit", tmp_path / "log",
                        typed=lines.format(change))
        assert done.returncode == 5
        assert said in done.stderr
