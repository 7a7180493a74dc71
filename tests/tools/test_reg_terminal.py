"""``maia reg`` on a terminal: questions, the shell with its history and completion, colours."""

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
from helpers.emulator import environment, running

SECONDS = 40


class Terminal:
    """A process on a pseudo terminal: what it prints, and what is typed."""

    def __init__(self, arguments, **more):
        self._file, there = pty.openpty()
        env = {**environment(), "TERM": "xterm", "COLUMNS": "100", "LINES": "40", **more}
        env["PYTHONPATH"] += os.pathsep + os.path.join(env["PYTHONPATH"].split(os.pathsep)[0], "tools")
        self.process = subprocess.Popen([sys.executable, "-m", "maia_tools.cli", *map(str, arguments)], stdin=there,
                                        stdout=there, stderr=there, env=env, start_new_session=True)
        os.close(there)
        self.text = ""

    def _more(self, seconds):
        if not select.select([self._file], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._file, 4096).decode(errors="replace")
        except OSError:  # the other end is closed
            return False
        if "\x1b[6n" in data:  # where is the cursor?
            os.write(self._file, b"\x1b[1;1R")
        self.text += data
        return bool(data)

    def wait(self, pattern):
        """Read until the output since the last `type` has this."""
        deadline = time.monotonic() + SECONDS
        while not re.search(pattern, self.text):
            assert time.monotonic() < deadline, f"waited for {pattern!r} in vain: {self.text!r}"
            assert self._more(1) or self.process.poll() is None, self.text
        return self.text

    def type(self, text):
        self.text = ""
        os.write(self._file, text.encode())

    def end(self):
        """Everything up to the end of the process; its exit code."""
        while self._more(SECONDS):
            pass
        return self.process.wait(SECONDS)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._file)


@pytest.fixture(scope="module")
def path():
    with running() as (_, paths):
        yield paths[0]


@pytest.fixture
def terminal(path, tmp_path):
    opened = []

    def run(verb, *arguments):
        opened.append(Terminal(["reg", verb, *arguments, "-d", path], XDG_STATE_HOME=str(tmp_path)))
        return opened[-1]

    yield run
    for one in opened:
        one.close()


@pytest.mark.parametrize(("answer", "code", "said"), [("y\n", 0, r"SCRATCH 0x00000000 -> 0x00000005"),
                                                      ("n\n", 1, "not written"), ("\n", 1, "not written")])
def test_a_write_asks_and_takes_no_for_an_answer(terminal, tmp_path, answer, code, said):
    session = terminal("write", "scratch", "5")
    assert ".VALUE (rw)  0x0 -> 0x5" in session.wait(r"Write\? \[y/N\]")
    session.type(answer)
    assert session.end() == code
    assert re.search(said, session.text)
    assert (tmp_path / "maia-rt" / "registers.log").exists() == (code == 0)


def test_the_shell_completes_remembers_and_goes_on_after_an_error(terminal, tmp_path):
    session = terminal("shell")
    session.wait("maia>")
    session.type("read heart\t")
    session.wait("HEARTBEAT")
    session.type("\r")
    # The prompt after the answer, not the one before: keys between the two are lost.
    session.wait(r"(?s)HEARTBEAT\s+bar0:0x0088.*maia>")
    session.type("read nope\r")
    session.wait("(?s)no register nope.*maia>")
    session.type("scratch = 5\r")
    session.wait("(?s)only reads.*maia>")
    session.type("\x04")
    assert session.end() == 0
    history = tmp_path / "maia-rt" / "history"
    assert "+read HEARTBEAT" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_the_shell_asks_before_each_write(terminal):
    session = terminal("shell", "--write")
    session.wait("maia>")
    session.type("scratch = 5\r")
    session.wait(r"Write\?")
    session.type("y\r")
    session.wait("(?s)SCRATCH 0x00000000 -> 0x00000005.*maia>")
    session.type("quit\r")
    assert session.end() == 0


def test_tables_are_bold_on_a_terminal_and_plain_where_asked_to(terminal, monkeypatch):
    session = terminal("read", "id")
    session.end()
    assert "\x1b[1m" in session.text
    monkeypatch.setenv("NO_COLOR", "1")
    session = terminal("read", "id")
    session.end()
    assert "\x1b[" not in session.text
