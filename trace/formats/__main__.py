"""`python -m trace.formats import ...` and `python -m trace.formats export ...`."""

import sys

from routing.process.exits import EXIT_BAD_INPUT
from trace.formats import exporting, importing

COMMANDS = {"import": importing.main, "export": exporting.main}

if __name__ == "__main__":
    command = COMMANDS.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if command is None:
        print(f"usage: python -m trace.formats {'|'.join(COMMANDS)} [options]", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)
    command(sys.argv[2:])
