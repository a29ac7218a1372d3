"""``lamkernels bench``: microbenchmarks beside the peers."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import (
    compat,
    covariance_error,
    estimate,
    first_call,
    hard_data,
    labelling,
    one_pass,
    page,
    profile_step,
    report,
    screening,
    tune,
)
from .providers import PROVIDERS
from .runner import Settings, run
from .step_models import SIZES
from .workloads import DTYPES, OPS, SUITES, Workload, select


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line."""
        self.exit(2, f"{self.prog}: {message}\n")


def _names(option: str, allowed: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name for name in text.replace(",", " ").split() if name]
        unknown = [name for name in names if name not in allowed]
        if unknown or not names:
            shown = ", ".join(map(repr, unknown)) or "empty"
            raise argparse.ArgumentTypeError(f"{option} is {shown}; allowed are {', '.join(allowed)}")
        return names

    return parse


def _name(option: str, allowed: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"{option} is {text!r}; allowed are {', '.join(allowed)}, one of them")
        return text

    return parse


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"--shape is {text!r}; it must be three positive integers N,K,D")
    rows, codes, dim = map(int, parts)
    return rows, codes, dim


def _device(text: str) -> str:
    try:
        return estimate.device_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(option: str, kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{option} is {text!r}; it must be a positive number")
        return value

    return parse


def _parser() -> _Parser:
    parser = _Parser(
        prog="lamkernels bench",
        description="Times lamkernels and its peers on the same workloads: correctness against fp64 first, one process "
        "per provider, in turns, rooflines from peaks measured in the same process.",
        epilog="Suites, ops and providers take commas. Ours are marked *; 'vs best peer': the best peer's time / ours.",
    )
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--suite", type=_names("--suite", SUITES), default=["lam", "tokenizer"], help=", ".join(SUITES))
    add("--op", type=_names("--op", OPS), default=list(OPS), help=", ".join(OPS))
    add(
        "--shape", type=_shape, action="append", default=[], metavar="N,K,D", help="in place of the suite's; repeatable"
    )
    add("--dtype", type=_name("--dtype", DTYPES), help="in place of the workloads' own: " + ", ".join(DTYPES))
    add("--device", type=_name("--device", ("cpu", "cuda")), default="cuda" if cuda else "cpu", help="cpu or cuda")
    add("--providers", type=_names("--providers", tuple(PROVIDERS)), default=list(PROVIDERS), help=", ".join(PROVIDERS))
    add("--threads", type=_positive("--threads", int), default=torch.get_num_threads(), help="for every provider alike")
    add("--rounds", type=_positive("--rounds", int), help="how often the providers take turns (3)")
    add("--seconds", type=_positive("--seconds", float), help="of sampling in each turn (1)")
    add("--timeout", type=_positive("--timeout", float), default=600.0, help="seconds to wait for one answer (600)")
    add("--quick", action="store_true", help="2 rounds of 0.2 seconds")
    add("--json", type=Path, metavar="PATH", help="write all rows and the context, after each workload")
    add("--resume", action="store_true", help="keep what --json has of this commit and machine, and run the others")
    add("--csv", type=Path, metavar="PATH", help="write all rows in fixed columns")
    add("--plot", type=Path, metavar="PATH", help="write bars per workload (png, svg or pdf)")
    add("--out", type=Path, metavar="DIR", help="write bench.json, bench.csv and bench.png there")
    add("--tune", action="store_true", help="instead: the fastest tiles on this GPU, as rows for tuning.py")
    add("--estimate", type=_device, metavar="GPU", help="instead: the least cost on H200, A100, ..., without a GPU")
    add("--page", type=Path, metavar="PATH", help="instead: write the page of all committed results")
    add("--hard-data", action="store_true", help="instead: which codes each provider gives on data made to mislead it")
    add("--covariance-error", action="store_true", help="instead: errors of covariances against fp64, on the CPU")
    add("--first-call", action="store_true", help="instead: what the first calls on the CPU cost")
    add("--host-time", action="store_true", help="instead: what eager calls on a GPU take of the host, without a GPU")
    add("--one-pass", action="store_true", help="instead: what the forward costs beyond the lookup on the CPU")
    add("--compat", action="store_true", help="instead: the bottlenecks of LAPA, UniVLA, ..., plain and drop-in forms")
    add("--labelling", action="store_true", help="instead: labels of a data set on the CPU, beside one pair at a time")
    add("--screening", action="store_true", help="instead: what a bf16 product would decide of a lookup on the CPU")
    add(
        "--profile", type=_name("--profile", tuple(SIZES)),
        help="instead: where a training step's time goes, at the sizes of lapa or univla (--quick: not compiled)",
    )  # fmt: skip
    add("--list", action="store_true", help="list the workloads and providers, and run nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when one of our providers failed or gave a wrong result, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args = parser.parse_args(argv)
    device = args.device
    if args.page:
        return _page(parser, args.page)
    if args.estimate:
        return _estimate(parser, args, argv)
    if device == "cuda" and not torch.cuda.is_available() and not args.list:
        parser.error("--device is 'cuda', but torch finds no CUDA or ROCm device; allowed here is cpu")
    paths = {"json": args.json, "csv": args.csv, "plot": args.plot}
    if args.out:
        paths = {kind: path or args.out / f"bench.{'png' if kind == 'plot' else kind}" for kind, path in paths.items()}
    if args.resume and not paths["json"]:
        parser.error("--resume goes on with what --json (or --out) holds, and neither is given")
    if args.host_time and importlib.util.find_spec("triton") is None:
        parser.error("--host-time needs triton; pip install triton")
    if paths["plot"] and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot and --out need matplotlib; pip install 'lamkernels[bench]'")
    if paths["plot"] and paths["plot"].suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--plot is {str(paths['plot'])!r}; allowed are names in .png, .svg or .pdf")
    workloads = select(args.suite, args.op, device, args.shape, args.dtype)
    if not workloads:
        parser.error(f"no workload of suite {', '.join(args.suite)} has op {', '.join(args.op)} on {device}")
    if args.list:
        return _list(workloads, device)
    if args.tune:
        return _tune(parser, args, device, argv)
    if args.hard_data:
        return _hard_data(args.providers, argv, paths["json"])
    if args.covariance_error:
        return _covariance_error(argv, paths["json"])
    if args.first_call:
        return _first_call(argv, paths["json"])
    if args.host_time:
        return _host_time(0.1 if args.quick else args.seconds or 1.0, argv, paths["json"])
    if args.labelling:
        return _labelling(args.quick, argv, paths["json"])
    if args.one_pass:
        shapes = dict.fromkeys((w.N, w.K, w.D) for w in workloads)
        return _one_pass(shapes, 0.2 if args.quick else args.seconds or 1.0, argv, paths["json"])
    if args.compat:
        return _compat(0.2 if args.quick else args.seconds or 1.0, device, argv, paths["json"])
    if args.profile:
        return _profile(args, device, argv, paths["json"])
    if args.screening:
        shapes = dict.fromkeys((w.N, w.K, w.D) for w in workloads)
        return _screening(shapes, 0.2 if args.quick else args.seconds or 1.0, argv, paths["json"])
    settings = Settings(
        device=device,
        threads=args.threads,
        rounds=args.rounds or (2 if args.quick else 3),
        seconds=args.seconds or (0.2 if args.quick else 1.0),
        timeout=args.timeout,
    )
    about = report.context(device, argv)
    rows = report.kept(paths["json"], about) if args.resume else []
    done = {report.workload_of(row) for row in rows}
    workloads = tuple(workload for workload in workloads if (workload.suite, workload.name) not in done)
    print(
        f"{about['hardware']}, {settings.threads} threads, torch {about['torch']}, {settings.rounds} rounds", end="\n\n"
    )
    interrupted = False
    try:
        for group in run(workloads, args.providers, settings):
            rows += group
            if group:
                print(report.table(group), end="\n\n", flush=True)
                if paths["json"]:
                    report.write_json(paths["json"], rows, about)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: what follows covers the workloads above", file=sys.stderr)
    if rows:
        print(report.summary(rows))
        writers = {"json": report.write_json, "csv": report.write_csv, "plot": report.write_plot}
        for kind, path in paths.items():
            if path:
                writers[kind](path, rows, about)
                print(f"wrote {path}")
    failed = any(row.kind == "ours" and row.status in ("error", "wrong") for row in rows)
    return 130 if interrupted else int(failed)


def _tune(parser: _Parser, args: argparse.Namespace, device: str, argv: Sequence[str]) -> int:
    if device != "cuda":
        parser.error("--tune times tiles on a GPU: it needs --device cuda")
    workloads: tuple[Workload, ...] = tune.WORKLOADS
    if args.shape:
        workloads = tuple(w for w in select([], args.op, device, args.shape, args.dtype) if w.op in tune.RULES)
    if not workloads:
        parser.error(f"--tune has no rule for {', '.join(args.op)}; it has for {', '.join(tune.RULES)}")
    return tune.run(workloads, args.seconds or (0.05 if args.quick else 0.2), args.json, argv)


def _page(parser: _Parser, path: Path) -> int:
    if not page.RESULTS.is_dir():
        parser.error(f"--page reads {page.RESULTS}, which an installed package does not have; run it in a checkout")
    for written in (*page.write(path), path):
        print(f"wrote {written}")
    return 0


def _estimate(parser: _Parser, args: argparse.Namespace, argv: Sequence[str]) -> int:
    if args.plot:
        parser.error("--estimate has no --plot; allowed are --json, --csv and --out")
    workloads = select(args.suite, args.op, "cuda", args.shape, args.dtype)
    if not workloads:
        parser.error(f"no workload of suite {', '.join(args.suite)} has op {', '.join(args.op)}")
    paths = [
        path or (args.out and args.out / f"estimate.{kind}") for kind, path in (("json", args.json), ("csv", args.csv))
    ]
    return estimate.run(workloads, args.estimate, shlex.join(["lamkernels", "bench", *argv]), *paths)


def _hard_data(providers: Sequence[str], argv: Sequence[str], path: Path | None) -> int:
    found = hard_data.outcomes(providers)
    print(hard_data.table(found))
    print("rows with a wrong code; t: exact ties not to the lowest index; n: rows that are not finite with a code")
    for outcome in found:
        if outcome.error:
            print(f"{outcome.provider} on {outcome.data}: {outcome.error}")
    _write(path, argv, {"outcomes": [outcome._asdict() for outcome in found]})
    ours = [o for o in found if PROVIDERS[o.provider].kind != "peer"]
    return int(any(o.wrong or o.not_finite or o.error for o in ours))


def _covariance_error(argv: Sequence[str], path: Path | None) -> int:
    found = covariance_error.outcomes()
    print(covariance_error.table(found))
    _write(path, argv, {"errors": [outcome._asdict() for outcome in found]})
    return int(any(outcome.error > 1e-7 for outcome in found if outcome.estimator in ("moments", '"exact"')))


def _first_call(argv: Sequence[str], path: Path | None) -> int:
    seconds = first_call.first_calls()
    print(f"{'s':40}{'compiled':>10}{'cached':>10}")
    for name, compiled in seconds["compiled"].items():
        print(f"{name:40}{compiled:10.2f}{seconds['cached'][name]:10.2f}")
    _write(path, argv, {"seconds": seconds})
    return 0


def _host_time(seconds: float, argv: Sequence[str], path: Path | None) -> int:
    from . import host_time  # needs Triton

    found = host_time.host_times(seconds)
    print(f"{'µs of the host':42}{'launches':>9}{'call':>8}{'less Triton':>13}")
    for row in found:
        print(f"{row.call:42}{row.launches:9}{row.microseconds:8.1f}{row.without_triton:13.1f}")
    _write(path, argv, {"microseconds": [row._asdict() for row in found]})
    return 0


def _one_pass(shapes: Iterable[tuple[int, int, int]], seconds: float, argv: Sequence[str], path: Path | None) -> int:
    found = [one_pass.one_pass(shape, seconds) for shape in shapes]
    print(f"{'ms at (N, K, D)':22}{'lookup':>9}{'forward':>9}{'copy':>9}{'clone':>9}{'allowed':>9}")
    for row in found:
        print(f"{row.shape!s:22}{row.lookup:9.3f}{row.forward:9.3f}{row.copy:9.3f}{row.clone:9.3f}{row.allowed:9.3f}")
    print("copy: into memory that is there already; clone: into new memory, as the output is")
    print("allowed: 1.1 × the lookup from 1024 codes on, else the lookup and 1.2 × the copy of the rows")
    _write(path, argv, {"milliseconds": [row._asdict() | {"allowed": row.allowed} for row in found]})
    return 0


def _compat(seconds: float, device: str, argv: Sequence[str], path: Path | None) -> int:
    columns = f"{'plain':>9}{'drop-in':>9}{'ratio':>8}{'harness':>9}{'beyond':>9}{'kernels':>9}"
    print(f"{'µs a training step':28}{'(N, K, D)':>18}{columns}")
    rows: list[dict[str, Any]] = []
    for case in compat.CASES:
        times = compat.compare(case, seconds, device)
        numbers = f"{times.plain:9.0f}{times.fused:9.0f}{times.speedup:7.2f}×"
        numbers += f"{times.harness:9.0f}{times.beyond_harness:8.2f}×"
        numbers += f"{'':>9}" if times.kernels is None else f"{times.kernels:9.0f}"
        print(f"{times.project:28}{times.shape!s:>18}{numbers}", flush=True)
        rows.append(times._asdict() | {"speedup": times.speedup, "beyond_harness": times.beyond_harness})
        found = {"threads": torch.get_num_threads(), "microseconds": rows}
        _write(path, argv, found, device)  # what follows may be cut off
    print("harness: the step with a bottleneck of recorded results; beyond: the ratio of what the forms take beyond it")
    print("kernels: the compiled calls of the drop-in form by themselves; blank where they run on several threads")
    return 0


def _profile(args: argparse.Namespace, device: str, argv: Sequence[str], path: Path | None) -> int:
    torch.set_num_threads(args.threads)
    seconds = args.seconds or (0.2 if args.quick else 1.0)

    def keep(found: profile_step.Profile) -> None:
        _write(path, argv, {"threads": args.threads, "profile": profile_step.as_json(found)}, device)

    found = profile_step.profile(args.profile, device, seconds, keep=keep)
    if not args.quick:
        found = profile_step.with_compiled(found, device, seconds, keep)
    print(profile_step.table(found))
    return 0


def _labelling(quick: bool, argv: Sequence[str], path: Path | None) -> int:
    threads = torch.get_num_threads()
    found = [labelling.labelling(name, quick=quick) for name in labelling.ENCODERS]
    print(f"{'us a pair':12}{'one by one':>12}{'label':>9}{'encoder':>9}{'ratio':>8}{'unequal':>9}{'wrong':>7}")
    for row in found:
        times = f"{row.pattern:12.1f}{row.label:9.1f}{row.encoder_only:9.1f}{row.speedup:8.1f}"
        print(f"{row.encoder:12}{times}{row.unequal:9}{row.wrong:7}")
    print("encoder: alone, at the batch size of label; wrong: unequal codes that are no near ties")
    rows = [row._asdict() | {"speedup": row.speedup} for row in found]
    _write(path, argv, {"threads": threads, "microseconds_per_pair": rows})
    return int(any(row.wrong for row in found))


def _screening(shapes: Iterable[tuple[int, int, int]], seconds: float, argv: Sequence[str], path: Path | None) -> int:
    found = [screening.screening(shape, seconds) for shape in shapes]
    print(
        f"{'ms at (N, K, D)':22}{'lookup':>9}{'sgemm':>9}{'bf16':>9}{'minimum':>9}{'undecided':>11}{'candidates':>12}"
    )
    for row in found:
        taken = "".join(f"{1e3 * t:9.2f}" for t in (row.lookup, row.sgemm, row.bf16, row.minimum))
        print(f"{row.shape!s:22}{taken}{row.undecided:11.1%}{row.candidates:8.2f}, ≤ {row.most}")
        if row.missed:
            print(f"the bound missed the nearest code of {row.missed} rows")
    _write(path, argv, {"screenings": [row._asdict() for row in found]})
    return int(any(row.missed for row in found))


def _write(path: Path | None, argv: Sequence[str], found: dict[str, Any], device: str = "cpu") -> None:
    if path:
        about = {"context": report.context(device, argv)} | found
        report.replace_file(path, (json.dumps(about, indent=1) + "\n").encode())
        print(f"wrote {path}")


def _list(workloads: Sequence[Any], device: str) -> int:
    for workload in workloads:
        print(f"{workload.suite:10} {workload.name}")
    print()
    for provider in PROVIDERS.values():
        print(f"{provider.name:12} {provider.absent(device) or 'available'}: {', '.join(provider.prepare)}")
    return 0
