"""``lamkernels label``: the latent actions of frames and features in files, as Parquet or safetensors."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamkernels.labelling.pairs import SHARD_ROWS
from lamkernels.labelling.run import label
from lamkernels.labelling.shards import FORMATS
from lamkernels.lam.files import load_tensors
from lamkernels.processes import process_group
from lamkernels.validation import METRICS, PRECISIONS


def main(argv: Sequence[str] | None = None) -> int:
    """Labels, and writes the shards and their manifest; returns the exit status."""
    parser = _parser()
    options = vars(parser.parse_args(argv))
    factory, arguments, files = (options.pop(name) for name in ("encoder", "encoder_option", "codebook"))
    options["device"] = options["device"] or _default_device()
    try:
        _check_device(options["device"])
        codebooks = [_codebook(name) for name in files]
        encoder = _encoder(factory, dict(arguments), options["device"])
        about = {"encoder": factory, "encoder_option": dict(arguments)}
        with process_group():
            manifest = label(
                encoder=encoder, codebook=codebooks[0] if len(codebooks) == 1 else codebooks, about=about, **options
            )
    except (OSError, TypeError, ValueError, ModuleNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    if manifest is not None:
        print(_summary(manifest))
        print(f"wrote {options['out']}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lamkernels label",
        description="Labels every pair of consecutive observations with its latent action. Goes on where it was "
        "stopped, to the same bytes; under torchrun, processes share the shards.",
    )
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help=".npy, .npz, .safetensors, .parquet, videos, folders, atari:GAME")
    add("--encoder", required=True, metavar="MODULE:FACTORY", help="FACTORY() returns encoder(o, o_next) -> rows")
    add(
        "--encoder-option",
        type=_assignment,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of FACTORY; VALUE is JSON, or else text; repeatable",
    )
    add(
        "--codebook",
        required=True,
        action="append",
        metavar="FILE[:KEY]",
        help="a tensor (K, D) or (H, K, D) of a .safetensors file, which needs no KEY if it is alone or named "
        "codebook; repeated, a residual list",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="folder of the shards and the manifest")
    add("--format", default="parquet", choices=FORMATS, help="default: %(default)s")
    add("--vectors", action="store_true", help="write the codes beside their indices")
    add("--batch-size", type=int, default=256, metavar="B", help="pairs at once; default: %(default)s")
    add("--lag", type=int, default=1, metavar="H", help="rows from o to o'; default: %(default)s")
    add("--shard-rows", type=int, default=SHARD_ROWS, metavar="N", help="rows of a shard; default: %(default)s")
    add("--shape", type=_shape, metavar="C,H,W", help="that the encoder wants an observation in; default: flat")
    add("--side", type=int, default=64, help="frames are resized to so many pixels squared; default: %(default)s")
    add("--rows", metavar="NAME", help="array or column of rows; default: rows, frames, features or observation.state")
    add("--metric", choices=METRICS, help="default: l2")
    add("--precision", choices=PRECISIONS, help="default: exact")
    add("--device", help="default: cuda where there is one, else cpu")
    return parser


def _assignment(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not name.isidentifier() or not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not positive integers with commas, such as 3,64,64")
    return tuple(map(int, parts))


def _default_device() -> str:
    """Each process of torchrun on a machine takes a GPU of its own, as far as they go."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device is {name!r}, which torch {torch.__version__} cannot use here: {reason}") from error


def _encoder(name: str, arguments: dict[str, Any], device: str) -> Any:
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ValueError(f"--encoder is {name!r}; it must be MODULE:FACTORY")
    if str(Path.cwd()) not in sys.path:  # a console script does not look into the folder that it is started in
        sys.path.insert(0, str(Path.cwd()))
    factory = getattr(importlib.import_module(module), attribute, None)
    if not callable(factory):
        raise ValueError(f"--encoder is {name!r}; {module} has no callable {attribute}")
    encoder = factory(**arguments)
    return encoder.to(device).eval() if isinstance(encoder, nn.Module) else encoder


def _codebook(name: str) -> Tensor:
    """The tensor of "file.safetensors" or "file.safetensors:key"."""
    file, colon, key = (name, "", "") if name.endswith(".safetensors") else name.rpartition(":")
    if not file.endswith(".safetensors"):
        raise ValueError(f"--codebook is {name!r}; it must be FILE.safetensors or FILE.safetensors:KEY")
    tensors, _ = load_tensors(Path(file))
    if not colon:
        key = "codebook" if "codebook" in tensors or len(tensors) != 1 else next(iter(tensors))
    if key not in tensors:
        raise ValueError(f"--codebook is {name!r}; {file} holds {', '.join(tensors) or 'nothing'}, but not {key}")
    return tensors[key]


def _summary(manifest: dict[str, Any]) -> str:
    lines = [
        f"{manifest['pairs']} pairs of {manifest['rows']} rows in "
        f"{sum(len(source['shards']) for source in manifest['sources'])} shards"
    ]
    if manifest["not_finite"]:
        lines.append(f"{manifest['not_finite']} pairs have an index of -1: the encoder's rows are not finite")
    lines += [f"skipped {s['source']}: {s['skipped']}" for s in manifest["sources"] if s["skipped"] is not None]
    return "\n".join(lines)
