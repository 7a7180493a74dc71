"""``python -m maia_emulator``."""

import sys

from maia_emulator.cli import main

if __name__ == "__main__":
    sys.exit(main())
