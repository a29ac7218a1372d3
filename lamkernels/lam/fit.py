"""``lamkernels fit``: the linear latent action model of features, videos and games, in one pass over them.

Rows are accumulated as means and covariances, so the fit is exact, memory does not grow with the data, and processes
(``torchrun``) share the work: each takes some of the segments, and one sum at the end makes the fit of all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, distributed
from torch.nn import functional as F

from lamkernels.covariance import Covariance
from lamkernels.lam import fit_figures, lerobot
from lamkernels.lam.commands import status
from lamkernels.lam.files import load_tensors, replacing, save_tensors, write_text
from lamkernels.lam.fit_report import measure, summary
from lamkernels.lam.linear import LinearLAM
from lamkernels.lam.sources import Batch, Source, expanded
from lamkernels.processes import process_group
from lamkernels.validation import check_integer, check_number, check_weight

SEGMENT = 256  # rows that go to one process and to one side of the split; no pair crosses the border of two segments
HELD_OUT = 5  # every fifth segment is


@dataclass(frozen=True)
class FitConfig:
    """What decides the result, together with the data.

    Attributes:
        sources: files and games, in order.
        latent_dim: k.
        lag: rows from o to o'.
        side: of resized frames, pixels.
        rows: name of the array of rows; None looks for the usual ones.
        actions: the same for the actions.
        num_actions: integer actions are one-hot vectors of this length.
        action_weight: λ of action supervision.
        rtol: least share of the largest variance of o that the regression on o uses (:class:`LinearLAM`).
    """

    sources: tuple[str, ...]
    latent_dim: int
    lag: int = 1
    side: int = 16
    rows: str | None = None
    actions: str | None = None
    num_actions: int = 18
    action_weight: float = 0.0
    rtol: float = 1e-5

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError where a number is not one or out of range."""
        for name in ("latent_dim", "lag", "side", "num_actions"):
            check_integer(name, getattr(self, name))
        check_weight("action_weight", self.action_weight)
        check_number("rtol", self.rtol, lambda value: 0 <= value < 1, "at least 0 and below 1")


@dataclass(frozen=True)
class Progress:
    """How far one process is.

    Attributes:
        source: index of the source that it reads.
        position: rows of that source that are dealt with.
        rows: rows taken in, of all sources.
        skipped: what could not be read: (source, reason).
    """

    source: int = 0
    position: int = 0
    rows: int = 0
    skipped: tuple[tuple[str, str], ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Fits, and writes the model, its report and its figures; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    kind = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    kind.add_argument("--model", choices=("linear", "nonlinear"), default="linear")
    if kind.parse_known_args(argv)[0].model == "nonlinear":
        from lamkernels.lam.fit_nonlinear import main as fit_nonlinear

        return fit_nonlinear(argv)
    parser = _parser()
    options = vars(parser.parse_args(argv))
    del options["model"]
    out, restart, seconds = (options.pop(name) for name in ("out", "restart", "checkpoint_seconds"))
    try:
        sources = expanded(options.pop("paths"), rows=options["rows"], camera=options.pop("camera"))
        config = FitConfig(sources=tuple(sources), **options)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))

    def work() -> None:
        with process_group():
            results = fit(config, out, restart=restart, checkpoint_seconds=seconds)
        if results is not None:
            say(summary(results), results, out)

    return status(parser, work)


def say(text: str, results: dict[str, Any], out: Path) -> None:
    """Prints the summary of a fit, and where it is written."""
    print(text)
    print(f"wrote {', '.join(str(out / name) for name in results['files'])}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lamkernels fit",
        description="Fits the linear latent action model in closed form, in one pass, and reports what its latent "
        "actions say. Runs again where it was stopped; under torchrun, processes share the rows. With --model "
        "nonlinear it trains the reference LAM on frames: lamkernels fit --model nonlinear --help.",
    )
    add = parser.add_argument
    add(
        "paths",
        nargs="+",
        metavar="PATH",
        help=".npy, .npz, .safetensors, .parquet, videos, folders, LeRobot data sets, atari:GAME",
    )
    add("--model", choices=("linear", "nonlinear"), default="linear", help="default: %(default)s")
    add("--latent-dim", type=int, default=8, metavar="K", help="default: %(default)s")
    add("--lag", type=int, default=1, metavar="H", help="rows from o to o'; default: %(default)s")
    add("--side", type=int, default=16, help="frames are resized to so many pixels squared; default: %(default)s")
    add("--rows", metavar="NAME", help="array or column of rows; default: rows, frames, features or observation.state")
    add("--actions", metavar="NAME", help="the same of the actions; default: actions or action")
    add("--camera", metavar="NAME", help="of LeRobot data sets; default: the first")
    add("--num-actions", type=int, default=18, help="integer actions are below it; default: %(default)s, as Atari's")
    add("--action-weight", type=float, default=0.0, metavar="λ", help="of action supervision; default: %(default)s")
    add(
        "--rtol", type=float, default=1e-5, help="least share of the largest variance that counts; default: %(default)s"
    )
    add("--out", type=Path, default=Path("fit-out"), metavar="DIR", help="default: ./fit-out")
    add("--checkpoint-seconds", type=float, default=60.0, metavar="S", help="between checkpoints; default: %(default)s")
    add("--restart", action="store_true", help="forget an earlier, unfinished fit in DIR")
    return parser


def fit(
    config: FitConfig, out: Path, *, restart: bool = False, checkpoint_seconds: float = 60.0
) -> dict[str, Any] | None:
    """Accumulates what is not accumulated yet, fits and writes; see the module.

    Args:
        config: what to fit.
        out: folder of the results and of the checkpoints, which a fit that was stopped goes on from.
        restart: whether to forget these.
        checkpoint_seconds: between two checkpoints.

    Returns:
        The report on the first process, None on the others.

    Raises:
        ValueError: no rows could be read, or the checkpoint in ``out`` is of another fit.
        OSError: a file cannot be written.
    """
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    start = time.perf_counter()
    moments, progress = _accumulate(config, out / f"checkpoint-{rank}-of-{world}.safetensors", restart, rank, world,
                                    checkpoint_seconds)  # fmt: skip
    for part in moments.values():
        part.all_reduce()
    everyone: list[Any] = [None] * world
    if world > 1:
        distributed.all_gather_object(everyone, progress.skipped)
    else:
        everyone = [progress.skipped]
    if rank:
        return None
    fitted, held_out = moments["fitted"], moments["held_out"]
    if fitted.count < 2:
        raise ValueError(
            f"{fitted.count} pairs of rows are in, of {progress.rows} rows that this process read; a fit needs at "
            "least 2. Rows that are not finite, and episodes no longer than the lag, make none"
        )
    model = LinearLAM(config.latent_dim, action_weight=config.action_weight, rtol=config.rtol).fit(fitted)
    results = measure(model, fitted, held_out)
    results = {
        "schema": "lamkernels fit 1",
        "config": asdict(config),
        "skipped": sorted(set().union(*everyone)),
        "seconds": time.perf_counter() - start,
        **results,
    }
    figures = {"spectrum.png": fit_figures.spectrum(results)}
    if model.D.shape[1] == 3 * config.side**2:
        figures["effects.png"] = fit_figures.effects(model, config.side)
    results["files"] = ["report.json", "model.safetensors", "moments.safetensors", *figures]
    save_tensors(out / "model.safetensors", model.state_dict(), {"format": "lamkernels LinearLAM"})
    fitted.save(out / "moments.safetensors")
    for name, png in figures.items():
        with replacing(out / name) as path:
            path.write_bytes(png)
    write_text(out / "report.json", json.dumps(results, indent=1) + "\n")
    return results


def _accumulate(
    config: FitConfig, checkpoint: Path, restart: bool, rank: int, world: int, checkpoint_seconds: float
) -> tuple[dict[str, Covariance], Progress]:
    """The moments of this process's rows, those to fit and those held out."""
    from tqdm import tqdm

    blocks, progress = _blocks(config), Progress()
    # "exact": the innovation is what is left of o' when nearly all of it is explained
    moments = {name: Covariance(blocks, lag=config.lag, precision="exact") for name in ("fitted", "held_out")}
    stamp, segment_rows = _stamp(config, blocks, rank, world), _segment(config)
    if checkpoint.exists() and not restart:
        progress = _resume(checkpoint, stamp, moments)
    saved = time.monotonic()
    by_source = len(config.sources) >= 2 * world  # else by segments, and every process reads every source
    with tqdm(unit="row", unit_scale=True, initial=progress.rows, disable=rank > 0 or None) as bar:
        for index in range(progress.source, len(config.sources)):
            if by_source and index % world != rank:
                continue
            source = _source(config, index)
            bar.set_description(Path(config.sources[index]).name)
            position, done = 0, progress.position if index == progress.source else 0
            try:
                for batch in source:
                    for segment, rows in _pieces(position, len(batch.rows), done, segment_rows):
                        if by_source or segment % world == rank:
                            side = "held_out" if (segment + index) % HELD_OUT == HELD_OUT - 1 else "fitted"
                            starts = batch.starts[rows].clone()
                            starts[0] |= (position + rows.start) % segment_rows == 0
                            moments[side].update(_columns(config, blocks, batch, rows), starts=starts)
                            progress = replace(progress, rows=progress.rows + rows.stop - rows.start)
                    position += len(batch.rows)
                    progress = replace(progress, source=index, position=max(position, done))
                    bar.update(progress.rows - bar.n)
                    if time.monotonic() - saved > checkpoint_seconds:
                        _save(checkpoint, stamp, moments, progress)
                        saved = time.monotonic()
                failures = [(s.source, s.reason) for s in source.skipped]
            except UnfitError as error:
                failures = [(config.sources[index], str(error))]
            progress = replace(progress, source=index + 1, position=0, skipped=(*progress.skipped, *failures))
    _save(checkpoint, stamp, moments, progress)
    return moments, progress


class UnfitError(Exception):
    """A source whose rows do not go with those of the others."""


def _segment(config: FitConfig) -> int:
    return max(SEGMENT, 64 * config.lag)  # a segment loses the pairs that cross its end


def _source(config: FitConfig, index: int) -> Source:
    return Source(config.sources[index], side=config.side, rows=config.rows, actions=config.actions)


def _blocks(config: FitConfig) -> dict[str, int]:
    """The entries of "o", and of "a" where there are actions: as the first source has them that can be read."""
    reasons = []
    for index in range(len(config.sources)):
        source = _source(config, index)
        for batch in source:
            try:
                actions = (
                    {} if batch.actions is None else {"a": action_rows(batch.actions, config.num_actions).shape[1]}
                )
            except UnfitError as error:
                raise ValueError(f"{batch.source}: {error}") from error
            if config.action_weight > 0 and not actions:
                raise ValueError(f"action_weight is {config.action_weight}, and {batch.source} has no actions")
            return {"o": batch.rows.shape[1]} | actions
        reasons += [f"{skipped.source}: {skipped.reason}" for skipped in source.skipped]
    raise ValueError(f"no rows could be read; {'; '.join(reasons) or 'the sources are empty'}")


def _pieces(position: int, count: int, done: int, segment: int) -> Iterator[tuple[int, slice]]:
    """The segments of ``count`` rows from row ``position`` of a source on, and their rows, from row ``done`` on."""
    start = max(position, done)
    while start < position + count:
        stop = min((start // segment + 1) * segment, position + count)
        yield start // segment, slice(start - position, stop - position)
        start = stop


def _columns(config: FitConfig, blocks: dict[str, int], batch: Batch, rows: slice) -> dict[str, Tensor]:
    columns = {"o": batch.rows[rows]}
    if columns["o"].shape[1] != blocks["o"]:
        raise UnfitError(f"its rows have {columns['o'].shape[1]} entries, those of the first source {blocks['o']}")
    if "a" in blocks:
        if batch.actions is None:
            raise UnfitError("it has no actions, and the first source has")
        columns["a"] = action_rows(batch.actions[rows], config.num_actions).to(columns["o"])
        if columns["a"].shape[1] != blocks["a"]:
            raise UnfitError(
                f"its actions have {columns['a'].shape[1]} entries, those of the first source {blocks['a']}"
            )
    return columns


def action_rows(actions: Tensor, num_actions: int) -> Tensor:
    """(N, A): real actions as they are, integers one-hot of length ``num_actions``, −1 (no action) zeros.

    Raises:
        UnfitError: an integer is not an action.
    """
    if actions.is_floating_point():
        return actions.reshape(len(actions), -1)
    if actions.ndim > 1 and actions[0].numel() != 1:
        return actions.reshape(len(actions), -1).float()
    numbers = actions.reshape(-1).long()
    if len(numbers) and not -1 <= int(numbers.min()) <= int(numbers.max()) < num_actions:
        raise UnfitError(
            f"an action is {int(numbers.max() if numbers.max() >= num_actions else numbers.min())}; integer "
            f"actions must be in [-1, {num_actions - 1}]: --num-actions"
        )
    return F.one_hot(numbers.clamp(min=0), num_actions).float() * (numbers >= 0)[:, None]


def _stamp(config: FitConfig, blocks: dict[str, int], rank: int, world: int) -> str:
    """What a checkpoint must have been made from: the configuration and the files as they are now."""
    data = file_stamps(config.sources)
    return json.dumps({"config": asdict(config), "blocks": blocks, "rank": rank, "world": world, "files": data})


def file_stamps(sources: Iterable[str]) -> list[list[int]]:
    """Size and time of the last change of each source that is a file, and of what a LeRobot data set says of videos."""
    paths = [path for source in sources if (path := Path(source)).exists()]
    for root in dict.fromkeys(lerobot.root_of(path) for path in paths):
        if root is not None:
            paths += sorted(path for part in ("meta", "data") for path in (root / part).rglob("*") if path.is_file())
    files = [path.stat() for path in paths]
    return [[file.st_size, file.st_mtime_ns] for file in files]


def _save(path: Path, stamp: str, moments: dict[str, Covariance], progress: Progress) -> None:
    states = {f"{name}/{key}": value for name, part in moments.items() for key, value in part.state_dict().items()}
    save_tensors(path, states, {"fit": stamp, "progress": json.dumps(asdict(progress))})


def _resume(path: Path, stamp: str, moments: dict[str, Covariance]) -> Progress:
    try:
        states, metadata = load_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error}; --restart forgets it") from error
    if metadata.get("fit") != stamp:
        raise ValueError(f"{path} is of another fit, or a source has changed since; --restart forgets it")
    for name, part in moments.items():
        part.load_state_dict({key[len(name) + 1 :]: v for key, v in states.items() if key.startswith(f"{name}/")})
    saved = json.loads(metadata["progress"])
    return Progress(**saved | {"skipped": tuple(map(tuple, saved["skipped"]))})
