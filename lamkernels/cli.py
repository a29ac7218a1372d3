"""The command line: ``lamkernels info | bench | demo``. Each command is a module with a ``main(argv)``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "info": ("lamkernels.info", "versions, devices and backends, and what 'auto' would pick"),
    "bench": ("lamkernels.bench.cli", "microbenchmarks beside the peers"),
    "demo": ("lamkernels.lam.demo", "train the reference LAM on Atari frames, stock and fused, and report"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="lamkernels",
        usage="lamkernels COMMAND [options]",
        epilog="\n".join(f"  {name:7}{text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of the commands below")
    module = COMMANDS[parser.parse_args(argv[:1]).command][0]
    try:
        return int(importlib.import_module(module).main(argv[1:]))
    except ModuleNotFoundError as error:
        print(f"lamkernels {argv[0]} needs {error.name}; pip install 'lamkernels[{argv[0]}]'", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
