"""A whole training step as one CUDA graph: what a launch-bound step costs is then the work, not its launches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lamkernels.validation import check_integer

R = TypeVar("R")
Layout = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]


class Graphed(Generic[R]):
    """Runs a training step as before a few times, then captures it in a CUDA graph, and from then on replays it.

    Each call is one step on its own batch, also those that warm up, so training is what it would be without the graph:
    no state is saved or restored, and nothing is run twice. ``step`` does the whole of it: it zeroes the gradients
    (``set_to_none=True``), runs forward and backward, and steps the optimiser. Modules of this package update their
    buffers in place and wait for nothing, also where they replace dead codes.

    What a capture asks of a step (torch's rules): no answer from the GPU (``.item()``, ``if tensor``, ``.cpu()``), an
    optimiser with ``capturable=True`` whose learning rate is a tensor if it changes, no CPU random numbers, and Python
    that decides the same at every step, because it runs no more. Without an argument on a GPU the step is called as it
    is.

    Args:
        step: takes tensors, by position, and returns tensors, nested in tuples, lists and dictionaries, or None.
        warmup: how many calls run as before. The first compiles kernels and initialises codebooks by k-means; the
            third is the first in which the optimiser has all of its state.

    Example:
        >>> step = Graphed(train_step)
        >>> for frames, following in batches:
        ...     loss = step(frames, following)

    What is returned lies in the graph's memory and is overwritten by the next call: ``clone()`` what is to be kept.

    Raises:
        TypeError: ``step`` cannot be called, or an argument is no tensor.
        ValueError: an argument differs in shape, strides, dtype or device from that of the capture, not all are on one
            GPU, or ``warmup`` is below 1.
        RuntimeError: the capture fails; torch's reason is its cause.
    """

    def __init__(self, step: Callable[..., R], *, warmup: int = 3) -> None:
        if not callable(step):
            raise TypeError(f"step is a {type(step).__name__}; it must be a function of tensors")
        check_integer("warmup", warmup)
        self.step, self.warmup, self.calls = step, warmup, 0
        self._graph: Any = None
        self._stream: Any = None
        self._inputs: list[Tensor] = []
        self._layout: list[Layout] = []
        self._outputs: Any = None

    def __call__(self, *inputs: Tensor) -> R:
        """One step."""
        if not all(isinstance(arg, Tensor) for arg in inputs):
            raise TypeError("a graphed step takes tensors, by position; bind what else it needs beforehand")
        if not any(t.is_cuda for t in inputs):
            self.calls += 1
            return self.step(*inputs)
        if any(t.device != inputs[0].device for t in inputs):
            devices = ", ".join(str(t.device) for t in inputs)
            raise ValueError(
                f"the arguments are on {devices}; they must be on one GPU: a graph holds the values of others"
            )
        with torch.cuda.device(inputs[0].device):
            return self._on_gpu(inputs)

    def _on_gpu(self, inputs: Sequence[Tensor]) -> R:
        if self._graph is None:
            if self.calls < self.warmup:
                self.calls += 1
                return self._beside(inputs)
            self._capture(inputs)
        layout = _layout(inputs)
        for i, (found, wanted) in enumerate(zip(layout, self._layout, strict=False)):
            if found != wanted:
                raise ValueError(f"argument {i} is {_shown(found)}; the graph was captured with {_shown(wanted)}")
        if len(layout) != len(self._layout):
            raise ValueError(f"{len(layout)} arguments; the graph was captured with {len(self._layout)}")
        with torch.no_grad():
            for static, fresh in zip(self._inputs, inputs, strict=True):
                static.copy_(fresh)
        self._graph.replay()
        self.calls += 1
        outputs: R = self._outputs
        return outputs

    def _beside(self, inputs: Sequence[Tensor]) -> R:
        """The step on another stream: what autograd keeps must not belong to the default one."""
        here = torch.cuda.current_stream()
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            outputs = self.step(*inputs)
        here.wait_stream(self._stream)
        for tensor in _tensors(outputs):  # else the allocator may give their memory away before it is read
            tensor.record_stream(here)
        for tensor in _tensors(inputs):
            tensor.record_stream(self._stream)
        return outputs

    def _capture(self, inputs: Sequence[Tensor]) -> None:
        """Records the step; capturing runs none of it."""
        self._inputs, self._layout = [t.detach().clone() for t in inputs], _layout(inputs)
        for static, given in zip(self._inputs, inputs, strict=True):
            static.requires_grad_(given.requires_grad)
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                self._outputs = self.step(*self._inputs)
        except Exception as error:
            clean_up(here)
            raise RuntimeError(f"the step cannot be captured in a CUDA graph: {error}") from error
        self._graph = graph


def clean_up(here: torch.cuda.Stream) -> None:
    """After a capture that failed: torch stays on its stream, not ``here``, and refuses random numbers as if in it."""
    torch.cuda.set_stream(here)
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    with contextlib.suppress(RuntimeError):  # else it begins anew
        fresh.set_offset(generator.get_offset())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_cuda else []
    if isinstance(outputs, Mapping):
        outputs = tuple(outputs.values())
    return [t for part in outputs for t in _tensors(part)] if isinstance(outputs, (tuple, list)) else []


def _layout(tensors: Sequence[Tensor]) -> list[Layout]:
    return [(t.shape, t.stride(), t.dtype, t.device) for t in tensors]


def _shown(layout: Layout) -> str:
    shape, strides, dtype, device = layout
    return f"{tuple(shape)} with strides {strides}, {dtype} on {device}"
