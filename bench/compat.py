"""The bottlenecks of public latent action models at their own sizes: the plain form beside the drop-in form.

One training step: forward, losses, backward, update of the buffers. Both forms run in this process, in turns, from one
state and one seed; their results are compared before they are timed. A third form, the harness, takes its turns too: a
bottleneck that hands out results and gradients recorded beforehand. No form can take less. And the compiled calls of
the drop-in form are timed alone: what its step takes beyond them and the harness is torch's and Python's.
"""

from __future__ import annotations

import copy
import ctypes
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamkernels.backend import resolve
from lamkernels.compat import lapa, lapo, moto, open_genie, taming, tinyworlds, univla, villa_x
from lamkernels.one_call import numba_one_call

from .stock import lapa as plain_lapa
from .stock import lapo as plain_lapo
from .stock import moto as plain_moto
from .stock import open_genie as plain_open_genie
from .stock import taming as plain_taming
from .stock import tinyworlds as plain_tinyworlds
from .stock import univla as plain_univla
from .stock import villa_x as plain_villa_x

WARM = 20  # steps of each form that are not counted
ALONE = 50  # runs of a compiled call


class Case(NamedTuple):
    """A bottleneck as a project trains it.

    Attributes:
        project: its name, with what is timed of it.
        shape: (N, K, D): vectors, codes and dimensions.
        plain: the class of the plain form.
        fused: that of the drop-in form.
        arguments: of either constructor, for a device.
        inputs: shapes of the arguments of the forward, which get a gradient.
        losses: what the project adds to its loss, from what the forward returns; None where it adds nothing.
        prepare: changes a module before it is timed, such as by taking out what is the same in both forms.
        flat: what the forward returns, as one sequence.
    """

    project: str
    shape: tuple[int, int, int]
    plain: Callable[..., nn.Module]
    fused: Callable[..., nn.Module]
    arguments: Callable[[str], dict[str, Any]]
    inputs: tuple[tuple[int, ...], ...]
    losses: Callable[[Sequence[Any]], Tensor | None]
    prepare: Callable[[Any], None] = lambda module: None
    flat: Callable[[Any], Sequence[Any]] = lambda outputs: outputs


class Times(NamedTuple):
    """Microseconds a step, medians; ``kernels``: see :func:`kernel_seconds`."""

    project: str
    shape: tuple[int, int, int]
    plain: float
    fused: float
    harness: float
    kernels: float | None
    steps: int

    @property
    def speedup(self) -> float:
        return self.plain / self.fused

    @property
    def beyond_harness(self) -> float:
        """The ratio of what the two forms take beyond it."""
        return (self.plain - self.harness) / (self.fused - self.harness)


def _lapa(device: str) -> dict[str, Any]:
    return {"dim": 1024, "num_embeddings": 8, "embedding_dim": 32, "code_seq_len": 4, "device": device}


def _quantiser_of_lapa(module: Any) -> None:
    module.encode = lambda rows, _: rows
    module.decode = lambda rows, _: rows


def _codes_like_rows(module: Any) -> None:
    """As they are after training: those of the start are so close that rounding chooses between them."""
    nn.init.normal_(module.embedding.weight)


def _without_nesting(outputs: Any) -> Sequence[Any]:
    """(z_q, loss, (None, None, indices)) in one sequence."""
    return (*outputs[:-1], *outputs[-1])


def _vector_quantize_of(module: str) -> Callable[..., nn.Module]:
    """Imported when it is made: what else is timed does not need the package."""

    def make(**options: Any) -> nn.Module:
        made: nn.Module = import_module(module).VectorQuantize(**options)
        return made

    return make


def _losses_of_univla(outputs: Sequence[Any]) -> Tensor:
    _, z, x, _ = outputs
    return F.mse_loss(z, x.detach()) + 0.25 * F.mse_loss(x, z.detach())


CASES = (
    Case(
        "LAPA", (256, 8, 32), plain_lapa.NSVQ, lapa.NSVQ, _lapa, ((256, 32),) * 2, lambda _: None, _quantiser_of_lapa
    ),
    Case(
        "LAPA with its projections", (256, 8, 32), plain_lapa.NSVQ, lapa.NSVQ, _lapa, ((64, 64, 1024),) * 2,
        lambda _: None,
    ),
    Case(
        "UniVLA", (256, 16, 128), plain_univla.VectorQuantizer, univla.VectorQuantizer,
        lambda _: {"num_latents": 16, "latent_dim": 128}, ((64, 4, 128),), _losses_of_univla,
    ),
    Case(
        "villa-X", (256, 32, 128), plain_villa_x.VectorQuantizer2, villa_x.VectorQuantizer2,
        lambda _: {"n_e": 32, "e_dim": 128, "beta": 0.25}, ((64, 1, 512),), lambda outputs: outputs[1],
        flat=_without_nesting,
    ),
    Case(
        "Moto", (256, 128, 32), plain_moto.VectorQuantizer2, moto.VectorQuantizer2,
        lambda _: {"n_e": 128, "e_dim": 32, "beta": 0.25}, ((32, 8, 32),), lambda outputs: outputs[2],
    ),
    Case(
        "LAPO", (4096, 64, 16), plain_lapo.VQEmbeddingEMA, lapo.VQEmbeddingEMA,
        lambda _: {"cfg": plain_lapo.VQConfig()}, ((512, 128),), lambda outputs: outputs[1],
    ),
    Case(
        "open-genie", (256, 256, 8), plain_open_genie.LookupFreeQuantization, open_genie.LookupFreeQuantization,
        lambda _: {"d_codebook": 8}, ((16, 16, 8),), lambda outputs: outputs[2],
        flat=lambda outputs: (*outputs[0], outputs[1]),
    ),
    Case(
        "tinyworlds", (256, 32, 5), plain_tinyworlds.FiniteScalarQuantizer, tinyworlds.FiniteScalarQuantizer,
        lambda _: {"latent_dim": 5, "num_bins": 2}, ((32, 8, 5),), lambda _: None, flat=lambda quantized: (quantized,),
    ),
    Case(
        "taming-transformers", (1024, 1024, 256), plain_taming.VectorQuantizer2, taming.VectorQuantizer2,
        lambda _: {"n_e": 1024, "e_dim": 256, "beta": 0.25}, ((4, 256, 16, 16),), lambda outputs: outputs[1],
        _codes_like_rows, _without_nesting,
    ),
)  # fmt: skip
if find_spec("vector_quantize_pytorch") is not None:
    CASES += (
        Case(
            "vector-quantize-pytorch", (1024, 64, 16), _vector_quantize_of("vector_quantize_pytorch"),
            _vector_quantize_of("lamkernels.compat.vector_quantize_pytorch"),
            lambda _: {"dim": 16, "codebook_size": 64}, ((8, 128, 16),), lambda outputs: outputs[2],
        ),
    )  # fmt: skip


class _Recorded(torch.autograd.Function):
    """The recorded outputs, and to each input and parameter the recorded gradient."""

    @staticmethod
    def forward(ctx: Any, found: tuple[list[Tensor], list[Tensor | None]], *leaves: Tensor) -> tuple[Tensor, ...]:
        outputs, ctx.gradients = found
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        # a tensor that nobody else holds is taken for .grad as it is
        return None, *[gradient if gradient is None else gradient.detach() for gradient in ctx.gradients]


class Harness(nn.Module):
    """What a module returned and sent back in one step, without the module."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        outputs = step()
        self.leaves = [leaf for leaf in step.leaves if leaf.grad is not None]
        self.places = [i for i, out in enumerate(outputs) if isinstance(out, Tensor) and out.requires_grad]
        self.outputs = list(outputs)
        gradients: list[Tensor | None] = [None if leaf.grad is None else leaf.grad.clone() for leaf in self.leaves]
        self.found = [outputs[i].detach().clone() for i in self.places], gradients

    def forward(self, *inputs: Tensor) -> Sequence[Any]:
        given = dict(zip(self.places, _Recorded.apply(self.found, *self.leaves), strict=True))  # type: ignore[no-untyped-call]
        return [given.get(i, out) for i, out in enumerate(self.outputs)]


class Step:
    """One training step of a module on fixed inputs, with a fixed gradient of the quantised vectors."""

    def __init__(self, case: Case, make: Callable[..., nn.Module], device: str) -> None:
        torch.manual_seed(0)
        self.module: Any = make(**case.arguments(device)).to(device)
        case.prepare(self.module)
        self.losses, self.flat = case.losses, case.flat
        self.inputs = [torch.randn(shape).to(device).requires_grad_() for shape in case.inputs]
        self.leaves = [*self.inputs, *self.module.parameters()]  # listed once: it takes as long as a kernel
        self.grad = torch.randn(self.flat(self.module(*self.inputs))[0].shape).to(device)

    def harness(self) -> Step:
        """A step with nothing in it but what this one returns and sends back."""
        empty = copy.copy(self)
        empty.module, empty.flat = Harness(self), lambda outputs: outputs
        return empty

    def __call__(self) -> Sequence[Any]:
        for tensor in self.leaves:
            tensor.grad = None
        outputs = self.flat(self.module(*self.inputs))
        loss = self.losses(outputs)
        heads, grads = ([outputs[0]], [self.grad]) if loss is None else ([outputs[0], loss], [self.grad, None])
        torch.autograd.backward(heads, grads)
        return outputs

    def results(self) -> dict[str, Tensor]:
        """What a step leaves behind, from a seed: outputs, gradients, state."""
        torch.manual_seed(1)
        outputs = self()
        found = {f"output {i}": torch.as_tensor(out).clone() for i, out in enumerate(outputs) if out is not None}
        named = (*enumerate(self.inputs), *self.module.named_parameters())
        found |= {f"gradient of {name}": tensor.grad for name, tensor in named if tensor.grad is not None}
        return found | {name: value.clone() for name, value in self.module.state_dict().items()}


def compare(case: Case, seconds: float, device: str) -> Times:
    """Compares the results of both forms over three steps, and then times them in turns.

    Raises:
        AssertionError: they differ.
    """
    steps = [Step(case, make, device) for make in (case.plain, case.fused)]
    for _ in range(3):
        expected, got = (step.results() for step in steps)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    steps.append(steps[0].harness())
    samples: list[list[float]] = [[], [], []]
    end = float("inf")
    while time.perf_counter() < end:
        for step, times in zip(steps, samples, strict=True):
            times.append(_seconds(step, device))
        if end == float("inf") and len(samples[0]) == WARM:
            samples, end = [[], [], []], time.perf_counter() + seconds
    plain, fused, harness = (1e6 * median(times) for times in samples)
    alone = kernel_seconds(steps[1]) if device == "cpu" else None
    return Times(case.project, case.shape, plain, fused, harness, alone and 1e6 * alone, len(samples[0]))


def kernel_seconds(step: Step) -> float | None:
    """What the compiled calls of a step take by themselves, everything they need in the cache; None without any.

    Each runs on copies of its parameters, on one thread, and its shortest run counts.
    """
    if resolve("auto", "cpu") != "numba":
        return None
    one_call = numba_one_call()
    found: list[float] = []

    def timed(call: Callable[[int], None], size: int) -> Callable[[int], None]:
        def run(address: int) -> None:
            seconds = []
            for _ in range(ALONE):
                parameters = ctypes.create_string_buffer(ctypes.string_at(address, size), size)
                start = time.perf_counter()
                call(ctypes.addressof(parameters))
                seconds.append(time.perf_counter() - start)
            found.append(min(seconds))
            call(address)

        return run

    def plan(*arguments: Any) -> Any:
        made = make(*arguments)
        return made and made._replace(
            call=timed(made.call, ctypes.sizeof(made.forward)),
            call_backward=timed(made.call_backward, ctypes.sizeof(made.backward)),
        )

    make = one_call.plan
    with mock.patch.object(one_call, "plan", plan):
        step()
    return sum(found) or None


def _seconds(step: Step, device: str) -> float:
    """Of the wall, until the device has done what the step asked for."""
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
