"""How an operator meets torch: one helper for the schema and kernels, one for vmap, and a way past the dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lamkernels.backend import load_kernel
from lamkernels.eager import apply, is_plain

NAMESPACE = "lamkernels"
_KERNELS: dict[str, Callable[..., Any]] = {}  # by operator, what runs it,
_PLAIN_GRADIENTS: dict[str, Any] = {}  # and the autograd function of plain tensors
_FRAGMENT = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]  # lives as long as the operators do


def register(name: str, folder: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines ``lamkernels::<name>`` and returns a function that calls it, see :func:`_past_the_dispatcher`.

    The last argument of every operator is ``str backend``. The kernel is the function ``name`` in
    ``lamkernels/ops/<folder>/<backend>.py``, picked on each call, so that one graph runs wherever it is loaded.

    Nothing is registered for autocast: an operator without a rule sees its inputs as they are, which is what
    bf16 rows with an fp32 codebook need.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema)

    def kernel(*args: Any) -> Any:
        *inputs, backend = args
        return load_kernel(folder, name, backend, inputs[0].device)(*inputs)

    _KERNELS[name] = kernel
    torch.library.impl(qualified, ("CPU", "CUDA"))(kernel)
    torch.library.register_fake(qualified)(lambda *args: fake(*args[:-1]))
    operator = getattr(torch.ops.lamkernels, name)
    torch.library.register_vmap(qualified, _fold_into_heads(operator))
    floats = [i for i, argument in enumerate(operator.default._schema.arguments) if str(argument.type) == "float"]
    return _past_the_dispatcher(name, operator, floats)


def _past_the_dispatcher(name: str, operator: Callable[..., Any], floats: Sequence[int]) -> Callable[..., Any]:
    """What calls the operator or, for plain tensors (see :func:`lamkernels.eager.is_plain`), the kernel.

    ``floats`` are the places of arguments of which a schema makes a float, whatever number they are.
    At the sizes of latent action models the dispatcher's way to a Python kernel and back costs as much as its launches.
    """

    def call(*args: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if not is_plain(*tensors, device=tensors[0].device.type):
            return operator(*args)
        if floats:
            args = tuple(float(arg) if i in floats else arg for i, arg in enumerate(args))
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
            return _KERNELS[name](*args)
        gradient = _PLAIN_GRADIENTS.get(name)  # what has none refuses to be differentiated
        return operator(*args) if gradient is None else apply(gradient, *args)

    call.__name__ = name
    return call


def register_gradient(
    name: str, backward: Callable[..., Any], setup_context: Callable[[Any, tuple[Any, ...], Any], None]
) -> None:
    """Gives ``lamkernels::<name>`` a gradient, as ``torch.library.register_autograd`` does.

    That one walks the schema on every call to restore default arguments; these operators have none.
    """
    operator = getattr(torch.ops.lamkernels, name).default

    def below(keyset: Any, args: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, *args_and_keyset: Any) -> Any:
        *args, keyset = args_and_keyset
        output = below(keyset, args)
        setup_context(ctx, tuple(args), output)
        return output

    methods = {
        "forward": staticmethod(forward),
        "backward": staticmethod(lambda ctx, *grads: (*backward(ctx, *grads), None)),
    }
    function: Any = type(f"{name}_with_gradient", (torch.autograd.Function,), methods)

    def kernel(keyset: Any, *args: Any) -> Any:
        differentiable = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        return function.apply(*args, keyset) if differentiable else below(keyset, args)

    _FRAGMENT.impl(name, kernel, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]

    def plain_forward(ctx: Any, *args: Any) -> Any:
        output = _KERNELS[name](*args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(plain_forward), "backward": staticmethod(backward)}
    _PLAIN_GRADIENTS[name] = type(f"{name}_of_plain_tensors", (torch.autograd.Function,), methods)


def register_backward(name: str, folder: str, schema: str, fake: Callable[..., Any]) -> Any:
    """:func:`register` for a backward, which refuses to be differentiated instead of being a constant."""

    def refuse(_ctx: Any, *_grads: Tensor | None) -> Any:
        raise NotImplementedError(
            f"{NAMESPACE}::{folder} has no second derivative: do not differentiate its gradient (create_graph=True)"
        )

    operator = register(name, folder, schema, fake)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", refuse)
    return operator


def _fold_into_heads(operator: Any) -> Callable[..., Any]:
    """The batching rule of every operator: a vmapped axis is more heads.

    Each tensor argument and result has the head axis first, so (B, H, ...) folds to (B·H, ...) and back. An argument
    that is not batched is expanded, which copies nothing while H = 1.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        def fold(arg: Any, dim: int | None) -> Any:
            if not isinstance(arg, Tensor):
                return arg
            batched = arg.movedim(dim, 0) if dim is not None else arg.expand(info.batch_size, *arg.shape)
            return batched.flatten(0, 1)

        outputs = operator(*(fold(arg, dim) for arg, dim in zip(args, in_dims, strict=True)))
        if isinstance(outputs, Tensor):
            return outputs.unflatten(0, (info.batch_size, -1)), 0  # type: ignore[no-untyped-call]
        unfolded = tuple(out.unflatten(0, (info.batch_size, -1)) for out in outputs)
        return unfolded, (0,) * len(unfolded)

    return rule
