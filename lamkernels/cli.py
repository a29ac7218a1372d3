"""The command line: ``lamkernels info | bench | fit | label | demo``, each a module with a ``main(argv)``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "info": ("lamkernels.info", "versions, devices and backends, and what 'auto' would pick"),
    "bench": ("lamkernels.bench.cli", "microbenchmarks beside the peers"),
    "fit": (
        "lamkernels.lam.fit",
        "a linear or nonlinear latent action model of your features, videos or games, with a report",
    ),
    "label": ("lamkernels.labelling.cli", "the latent actions of your data, as Parquet or safetensors, resumable"),
    "demo": ("lamkernels.lam.demo", "train the reference LAM on Atari frames, stock and fused, and report"),
}
EXTRAS = ("bench", "demo", "fit", "label")  # commands with an extra of their name


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
    command = parser.parse_args(argv[:1]).command
    try:
        status = int(importlib.import_module(COMMANDS[command][0]).main(argv[1:]))
        sys.stdout.flush()
        return status
    except ModuleNotFoundError as error:
        if command not in EXTRAS:
            raise
        print(f"lamkernels {command} needs {error.name}; pip install 'lamkernels[{command}]'", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing left to flush at exit
        return 1


if __name__ == "__main__":
    sys.exit(main())
