"""``maia reg shell``: the same commands without ``maia reg``, with history and completion, or from a pipe."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from maia_rt.errors import MaiaError
from maia_tools.failure import INTERRUPTED, USAGE, exit_code, explain, explain_usage, print_failure
from maia_tools.reg import audit
from maia_tools.reg.access import Access
from maia_tools.reg.options import Target, audit_option, held_session, session, target_options

PROMPT = "maia> "
LEAVE = ("quit", "exit", "q")
HELP = """\
The commands of maia reg without its name: ls, info, search, read, dump, walk, watch, diff, write, script.
NAME alone reads it, NAME = VALUE writes it, help COMMAND says more, # starts a comment, quit or Ctrl-D leaves.
`device` in diff is the device of this shell."""


@click.command()
@click.option("--write", "may_write", is_flag=True, help="Registers may be written; each write still asks.")
@audit_option
@target_options
def shell(may_write: bool, audit_path: Path | None, target: Target) -> int:
    """Keep a device open and type commands, or pipe them in.

    On a terminal with history and completion. From a pipe the first command that fails ends the shell with its exit
    code, and writes need --yes.
    """
    if held_session() is not None:
        raise click.UsageError("this is a shell already")
    with session(target, audit_path=audit_path, may_write=may_write, source="shell") as access:
        if sys.stdin.isatty():
            return _talk(access)
        return _follow(access)


def _follow(access: Access) -> int:
    for text in sys.stdin:
        code, over = execute(access, text)
        if over or code:
            return code
    return 0


def _talk(access: Access) -> int:
    click.echo(f"{access.name}, {'reads and writes' if access.may_write else 'read-only'}; help, quit", err=True)
    ask = _prompt(access)
    while True:
        try:
            text = ask()
        except EOFError:
            click.echo(err=True)
            return 0
        except KeyboardInterrupt:
            continue
        if execute(access, text)[1]:
            return 0


def execute(access: Access, text: str) -> tuple[int, bool]:
    """Run one line; its exit code, and whether it was the last one."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        print_failure(f"the line cannot be read: {error}", "a quote is open", "close it")
        return USAGE, False
    if not words:
        return 0, False
    if words[0] in LEAVE:
        return 0, True
    try:
        return _run(access, words), False
    except click.exceptions.Abort:
        click.echo(err=True)
        return INTERRUPTED, False
    except click.ClickException as error:
        print_failure(*explain_usage(error))
        return error.exit_code, False
    except (MaiaError, OSError) as error:
        print_failure(*explain(error))
        return exit_code(error), False
    except KeyboardInterrupt:
        click.echo(err=True)
        return INTERRUPTED, False


def _run(access: Access, words: list[str]) -> int:
    from maia_tools.reg.command import reg

    if words[0] == "help":
        if len(words) == 1 or words[1] not in reg.commands:
            click.echo(HELP)
            return 0
        words = [words[1], "--help"]
    if words[0] not in reg.commands:
        # `scratch`, `scratch = 5`, `scratch=5`
        name, equals, value = " ".join(words).partition("=")
        words = ["write", name.strip(), value.strip()] if equals else ["read", *words]
    result = reg.main(words, prog_name="", standalone_mode=False, obj=access)
    return result if isinstance(result, int) else 0


# The terminal.


def _prompt(access: Access) -> Callable[[], str]:
    """What asks for a line: prompt_toolkit where it is installed, else Python's own input."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import Completer, Completion
        from prompt_toolkit.history import FileHistory, InMemoryHistory
    except ImportError:
        click.echo("no history, no completion: pip install prompt_toolkit", err=True)
        return lambda: input(PROMPT)

    class Names(Completer):
        def get_completions(self, document: Any, complete_event: Any) -> Iterator[Any]:
            before = document.text_before_cursor
            word = before.rsplit(" ", 1)[-1]
            for candidate in candidates(access, before):
                yield Completion(candidate, start_position=-len(word))

    history: Any = InMemoryHistory()
    file = audit.state_folder() / "history"
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        history = FileHistory(str(file))
    session: Any = PromptSession(history=history, completer=Names(), complete_while_typing=False)
    return lambda: str(session.prompt(PROMPT))


def candidates(access: Access, before: str) -> list[str]:
    """What the word at the end of `before` may become: a command, an option, a register or a field."""
    from maia_tools.reg.command import reg

    words = before.split(" ")
    word = words[-1]
    if word.startswith("-") and words[0] in reg.commands:
        return sorted(o for p in reg.commands[words[0]].params for o in p.opts if o.startswith(word))
    found = sorted(c for c in [*reg.commands, "help", "quit"] if c.startswith(word)) if len(words) == 1 else []
    low = word.lower()
    for space in access.spaces:
        for register in space.registers:
            name = register.name_at(tuple(0 for _ in register.dimensions))
            if name.lower().startswith(low):
                found.append(name)
            if low.startswith(name.lower()) and low[len(name):len(name) + 1] == ".":
                found += [f"{name}.{f.name}" for f in register.fields if f"{name}.{f.name}".lower().startswith(low)]
    return found
