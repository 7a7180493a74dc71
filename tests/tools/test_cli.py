"""The ``maia`` command: it starts at once, fails in three lines, and its exit code says how."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from maia_tools import cli, failure

from maia_rt import errors

ROOT = Path(__file__).resolve().parents[2]


def test_help_and_version_import_neither_numpy_nor_the_runtime():
    code = ("import sys; from maia_tools.cli import main; main(['--help']); main(['--version']);"
            "print('HEAVY', [m for m in ('numpy', 'rich', 'maia_emulator') if m in sys.modules])")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "emulator", "tools"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr


def test_every_listed_command_can_be_imported_and_has_help(maia):
    for name in cli.COMMANDS:
        done = maia(name, "--help")
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout.lower()


@pytest.mark.parametrize(("error", "code"), [
    (errors.DeviceNotFound("x"), 3), (errors.DeviceBusy("x"), 3), (errors.DevicePermission("x"), 4),
    (errors.DeviceFault(10, device="d", queue=0, sequence=1), 5), (errors.DeviceLost("x"), 5),
    (errors.DeviceTimeout("x"), 6), (errors.InvalidArgument("x"), 2), (errors.MaiaError("x"), 1),
    (errors.Unsupported("x"), 1), (errors.TransportError("x", errno=errno.EPERM), 4),
    (errors.TransportError("x", errno=errno.EIO), 1), (errors.TransportError("x", errno=errno.EBUSY), 3),
    (PermissionError(errno.EACCES, "x"), 4), (OSError("x"), 1),
    (ZeroDivisionError("x"), 1),
])
def test_exit_codes_say_what_failed(error, code):
    assert failure.exit_code(error) == code


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values()
                                  if isinstance(kind, type) and issubclass(kind, errors.MaiaError)
                                  and not issubclass(kind, errors.DeviceFault)])
def test_every_error_has_three_parts_and_its_own_come_first(kind):
    assert failure.explain(kind("what", cause="why", hint="do")) == ("what", "why", "do")
    assert all(failure.explain(kind("what")))


def test_errors_of_python_have_three_parts_too():
    what, cause, hint = failure.explain(FileNotFoundError(errno.ENOENT, "x", "/no/such"))
    assert what == "/no/such: No such file or directory"
    assert cause
    assert hint
    assert "bug" in failure.explain(ZeroDivisionError("division by zero"))[1]


def test_unknown_commands_and_options_are_usage_errors(maia):
    assert maia("frobnicate").returncode == 2
    assert maia("reg", "ls", "--frobnicate").returncode == 2
    assert maia("reg", "read", "NO_SUCH_REGISTER").returncode == 2


def three_lines(text):
    """The parts of a failure."""
    lines = text.splitlines()
    assert len(lines) == 3, text
    assert lines[0].startswith("maia: ")
    assert lines[1].startswith("  cause: ")
    assert lines[2].startswith("  try: ")
    return [line.split(": ", 1)[1] for line in lines]


@pytest.mark.parametrize(("arguments", "code"), [
    (["reg", "read", "NO_SUCH_REGISTER"], 2), (["frobnicate"], 2), (["reg", "ls", "--frobnicate"], 2), (["bind"], 2),
    (["info", "--device", "/no/such/socket"], 3), (["info", "--device", "99"], 3), (["bind", "nonsense"], 2),
    (["release", "ffff:ff:1f.7"], 3), (["bind", "--driver", "a/b", "ffff:ff:1f.7"], 2), (["--frobnicate"], 2),
])
def test_a_failure_is_three_lines_on_stderr(maia, arguments, code):
    done = maia(*arguments)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert all(three_lines(done.stderr))


def test_a_traceback_comes_only_with_debug(maia):
    assert "Traceback" in maia("--debug", "reg", "read", "NO_SUCH_REGISTER").stderr


def test_a_reader_that_goes_away_is_no_error_worth_words(maia):
    read, write = os.pipe()
    os.close(read)
    done = maia("reg", "ls", capture_output=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.stderr == ""


def test_no_color_is_honoured_and_pipes_get_none(maia):
    assert "\x1b[" not in maia("reg", "ls").stdout
