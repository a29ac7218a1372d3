"""Where the time of a training step goes: ``lamkernels bench --profile lapa|univla``.

The whole step is timed with the stock and with the fused bottleneck, eager, compiled (layer by layer, which compiles a
layer once) and in a CUDA graph. Its parts are timed alone, forward and backward, on inputs of their own sizes, so that
one form of measurement serves all of them; what the whole takes beyond their sum is "the rest". Of each part the time
that its matrix products need at this machine's measured rate is subtracted: what is left is the most that a kernel
could gain, and the parts are ranked by it.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lamkernels.graphs import Graphed

from .peaks import measure_peaks
from .step_models import SIZES, Attention, Bottleneck, FeedForward, Lapa, Positions, Sizes, loss_of, make_model

ON_CPU = {"lapa": {"batch": 2, "depth": 1}, "univla": {"batch": 2, "depth": 1, "frozen": 1}}  # what is reduced there
QUESTIONS = ("_local_scalar_dense", "nonzero", "_unique2", "is_nonzero")  # operators whose answer the host waits for


class Step(NamedTuple):
    """A whole training step.

    Attributes:
        bottleneck: "stock", "fused", or "module": :class:`lamkernels.VectorQuantize` in its place.
        form: "eager", "compiled" or "graphed".
        ms: median wall time, to the end of the work; None where it does not run.
        operators: dispatched in forward, backward and optimiser; None where nothing is dispatched.
        launches: kernels on the GPU; None on a CPU.
        syncs: how often the host waits for an answer of the GPU; on a CPU, how often forward and backward would.
        note: why it does not run.
    """

    bottleneck: str
    form: str
    ms: float | None = None
    operators: int | None = None
    launches: int | None = None
    syncs: int | None = None
    note: str = ""


class Part(NamedTuple):
    """A part of the eager step, alone.

    Attributes:
        name: of the part.
        ms: forward and backward, median.
        share: of the eager step with the stock bottleneck.
        operators: dispatched.
        gflop: of its matrix products.
        products_ms: what these take at the measured rate of a large product.
        headroom_ms: ms − products_ms.
    """

    name: str
    ms: float
    share: float
    operators: int
    gflop: float
    products_ms: float
    headroom_ms: float


class Profile(NamedTuple):
    """What :func:`profile` finds; ``reduced`` names the sizes that are not the project's."""

    project: str
    sizes: Sizes
    reduced: dict[str, int]
    precision: str
    steps: list[Step]
    parts: list[Part]


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators = self.questions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        self.questions += func.overloadpacket.__name__ in QUESTIONS
        return func(*args, **(kwargs or {}))


class Harness:
    """One model, its optimiser and a batch of random frames."""

    def __init__(self, project: str, sizes: Sizes, bottleneck: Bottleneck, device: str) -> None:
        self.model, self.device = make_model(project, sizes, bottleneck, device), device
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, capturable=device == "cuda")
        self.frames = torch.rand(sizes.batch, 2, 3, sizes.image, sizes.image, device=device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 on a GPU."""
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else contextlib.nullcontext()

    def step(self, frames: Tensor) -> Tensor:
        """The whole of it."""
        loss = self.gradients(frames)
        self.optimizer.step()
        return loss

    def gradients(self, frames: Tensor) -> Tensor:
        """Without the optimiser."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = loss_of(self.model, frames)
        loss.backward()
        return loss.detach()

    def compile(self) -> None:
        """Every kind of layer once."""
        for module in self.model.modules():
            if isinstance(module, (Attention, FeedForward, Positions)):
                module.compile(dynamic=False)

    def pieces(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """The parts, each a call that runs one forward and backward."""
        model = self.model
        with torch.no_grad(), self.autocast():
            tokens = model.embedded(self.frames)
            context, _ = model.quantised(model.encoder(tokens))
        yield (
            "patch embedding" if isinstance(model, Lapa) else "frozen image encoder",
            lambda: self._both_ways(lambda _: model.embedded(self.frames), None),
        )
        for kind in model.encoder.kinds():
            yield f"encoder: {kind}", lambda kind=kind: self._both_ways(lambda x: model.encoder(x, None, kind), tokens)
        yield "bottleneck", lambda: self._both_ways(model.quantised, tokens)
        for kind in model.decoder.kinds():
            yield (
                f"decoder: {kind}",
                lambda kind=kind: self._both_ways(lambda x: model.decoder(x, context, kind), tokens[:, :1]),
            )
        yield "optimiser", self.optimizer.step

    def _both_ways(self, forward: Callable[[Any], Any], x: Tensor | None) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        leaf = None if x is None else x.detach().requires_grad_()
        with self.autocast():
            found = forward(leaf)
        outputs = [t for t in (found if isinstance(found, tuple) else (found,)) if t is not None and t.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])


def profile(
    project: str,
    device: str,
    seconds: float,
    sizes: Sizes | None = None,
    keep: Callable[[Profile], object] = lambda found: None,
) -> Profile:
    """Times the step of a project and its parts, for about ``seconds`` each.

    Args:
        project: "lapa" or "univla".
        device: "cpu", where sizes are reduced, or "cuda", where the precision is bf16 autocast.
        seconds: of sampling in each form and part; at least one call is timed.
        sizes: others than the project's.
        keep: is called with what there is, whenever there is more: the rest may be interrupted.
    """
    full = SIZES[project]
    sizes = sizes or replace(full, **(ON_CPU[project] if device == "cpu" else {}))
    bottlenecks: list[Bottleneck] = ["stock", "fused", "module"] if project == "lapa" else ["stock", "fused"]
    precision = "bf16 autocast" if device == "cuda" else "fp32"
    reduced = {name: value for name, value in vars(sizes).items() if value != vars(full)[name]}
    found = Profile(project, sizes, reduced, precision, [], [])
    for bottleneck in bottlenecks:
        for step in _steps(project, sizes, bottleneck, device, seconds):
            found.steps.append(step)
            keep(found)
    whole = next(step.ms for step in found.steps if step.ms is not None)
    found.parts.extend(_parts(project, sizes, device, seconds, whole))
    keep(found)
    return found


def with_compiled(
    found: Profile, device: str, seconds: float, keep: Callable[[Profile], object] = lambda found: None
) -> Profile:
    """The profile with the step in compiled form, stock and fused: last, because a compiler takes its time."""
    for bottleneck in ("stock", "fused"):
        harness = Harness(found.project, found.sizes, bottleneck, device)
        harness.compile()
        found.steps.append(_attempt(Step(bottleneck, "compiled"), harness, seconds))
        keep(found)
        torch._dynamo.reset()
    return found


def _steps(project: str, sizes: Sizes, bottleneck: Bottleneck, device: str, seconds: float) -> Iterator[Step]:
    harness = Harness(project, sizes, bottleneck, device)

    def run() -> Tensor:
        return harness.step(harness.frames)

    ms = _median_ms(run, device, seconds)
    with _Count() as all_of_it:
        run()
    with _Count() as count:
        harness.gradients(harness.frames)
    launches, syncs = _on_gpu(run) if device == "cuda" else (None, count.questions)
    yield Step(bottleneck, "eager", ms, all_of_it.operators, launches, syncs)
    if syncs and device == "cuda":  # a capture that fails leaves torch half in it
        yield Step(bottleneck, "graphed", note=f"a graph cannot wait for the GPU, and this step does {syncs} times")
    elif device == "cuda":
        yield _attempt(Step(bottleneck, "graphed"), harness, seconds)


def _attempt(step: Step, harness: Harness, seconds: float) -> Step:
    def run() -> Tensor:
        return harness.step(harness.frames)

    try:
        if step.form == "graphed":
            return step._replace(ms=_graphed_ms(harness, seconds), launches=1)
        ms = _median_ms(run, harness.device, seconds)
        return step._replace(ms=ms, launches=_on_gpu(run)[0] if harness.device == "cuda" else None)
    except Exception as error:  # whatever a form does not take is a row of the report
        if harness.device == "cuda":
            torch.cuda.synchronize()
        return step._replace(note=" ".join(f"{type(error).__name__}: {error}".split())[:200])


def _graphed_ms(harness: Harness, seconds: float) -> float:
    step = Graphed(harness.step)
    for _ in range(step.warmup + 1):
        step(harness.frames)
    return _median_ms(lambda: step(harness.frames), "cuda", seconds)


def _parts(project: str, sizes: Sizes, device: str, seconds: float, whole: float) -> list[Part]:
    rate = measure_peaks(device, "bfloat16" if device == "cuda" else "float32").flops
    harness, found = Harness(project, sizes, "stock", device), []
    harness.step(harness.frames)  # gradients and the state of the optimiser
    for name, run in harness.pieces():
        if name == "optimiser":
            harness.step(harness.frames)
        ms = _median_ms(run, device, seconds)
        with _Count() as count, FlopCounterMode(display=False) as flops:
            run()
        # the counter takes a depthwise convolution's backward for a full one
        counted = flops.get_flop_counts().get("Global", {}).items()
        products = sum(number for operator, number in counted if "convolution" not in str(operator))
        products_ms = 1e3 * products / rate
        found.append(Part(name, ms, ms / whole, count.operators, products / 1e9, products_ms, ms - products_ms))
    rest = whole - sum(part.ms for part in found)
    found.sort(key=lambda part: -part.headroom_ms)
    return [*found, Part("the rest", rest, rest / whole, 0, 0.0, 0.0, rest)]


def _median_ms(run: Callable[[], object], device: str, seconds: float) -> float:
    times: list[float] = []
    begin = float("inf")
    for warm in (True, False):
        begin = time.perf_counter()
        while not times or (not warm and time.perf_counter() - begin < seconds):
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        if warm:
            times.clear()
    return median(times)


def _on_gpu(run: Callable[[], object]) -> tuple[int, int]:
    """Kernels of a call, and how often it waits for one."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    kernels = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    launches = sum(not e.name.startswith(("Memcpy", "Memset")) for e in kernels)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return launches, sum("synchroniz" in str(one.message) for one in waits)


def table(found: Profile) -> str:
    """The profile as text."""
    reduced = ", ".join(f"{name} {value}" for name, value in found.reduced.items())
    lines = [f"{found.project}, {found.precision}" + (f"; reduced: {reduced}" if reduced else "")]
    lines += ["", f"{'bottleneck':12}{'form':10}{'ms':>10}{'operators':>11}{'launches':>10}{'syncs':>7}"]
    for step in found.steps:
        cells = [
            "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)
            for value in (step.ms, step.operators, step.launches, step.syncs)
        ]
        lines.append(f"{step.bottleneck:12}{step.form:10}{cells[0]:>10}{cells[1]:>11}{cells[2]:>10}{cells[3]:>7}")
        if step.note:
            lines.append(f"  {step.note}")
    lines += [
        "",
        f"{'part, alone':36}{'ms':>9}{'share':>8}{'operators':>11}{'GF':>9}{'products ms':>13}{'beyond ms':>11}",
    ]
    for part in found.parts:
        numbers = f"{part.ms:9.1f}{part.share:8.1%}{part.operators:11}{part.gflop:9.1f}"
        lines.append(f"{part.name:36}{numbers}{part.products_ms:13.1f}{part.headroom_ms:11.1f}")
    return "\n".join(lines)


def as_json(found: Profile) -> dict[str, Any]:
    """The profile for a file."""
    return {
        **found._asdict(),
        "sizes": vars(found.sizes),
        "steps": [step._asdict() for step in found.steps],
        "parts": [part._asdict() for part in found.parts],
    }
