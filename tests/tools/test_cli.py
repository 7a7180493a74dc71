"""The ``maia`` command: it starts at once, fails in one sentence, and its exit code says how."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from maia_tools import cli

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
])
def test_exit_codes_say_what_failed(error, code):
    assert cli.exit_code(error) == code


def test_unknown_commands_and_options_are_usage_errors(maia):
    assert maia("frobnicate").returncode == 2
    assert maia("reg", "ls", "--frobnicate").returncode == 2
    assert maia("reg", "read", "NO_SUCH_REGISTER").returncode == 2


def test_a_failure_is_one_sentence_on_stderr_and_a_traceback_only_with_debug(maia):
    done = maia("reg", "read", "NO_SUCH_REGISTER")
    assert done.stdout == ""
    assert done.stderr.startswith("maia: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" in maia("--debug", "reg", "read", "NO_SUCH_REGISTER").stderr


def test_a_reader_that_goes_away_is_no_error_worth_words(maia):
    read, write = os.pipe()
    os.close(read)
    done = maia("reg", "ls", capture_output=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.stderr == ""


def test_no_color_is_honoured_and_pipes_get_none(maia):
    assert "\x1b[" not in maia("reg", "ls").stdout
