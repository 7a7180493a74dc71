"""Write everything that is generated from the contract: ``python tools/generate.py [DIRECTORY]``.

One place for one fact: registers are described in maia_rt/contract/registers.rdl, structures in commands.py and
program.py. What is written here is committed, and a test writes it again and compares. Of docs/contract.md only the
tables are written.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import contract_page  # noqa: E402
import memory_layouts  # noqa: E402
import register_tables  # noqa: E402


def generate() -> dict[str, str]:
    """Every generated file: path from the top of the tree, and text."""
    registers = register_tables.Registers(ROOT)
    return {
        "maia_rt/contract/registers.py": register_tables.python(registers),
        "maia_rt/_fast/registers.pxd": register_tables.pxd(registers),
        "maia_rt/_fast/commands.pxd": memory_layouts.pxd(),
        "maia_rt/_fast/layout.pyx": memory_layouts.layout(),
        "docs/registers.md": register_tables.markdown(registers),
        "docs/contract.md": contract_page.markdown(ROOT),
    }


def main(arguments: list[str]) -> int:
    """Write the files below a directory, the project's by default."""
    target = Path(arguments[0]) if arguments else ROOT
    for name, text in generate().items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
