"""`HilbertAttentionFunction`: what every differentiable call goes through. It saves, launches and returns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import UnsupportedError
from .arguments import HeadOffsets, autocasts
from .dropout import Dropout

if TYPE_CHECKING:
    from . import ops
    from .plan import Plan

Rest: TypeAlias = "tuple[Plan | ops.Deferred, float | None, HeadOffsets | Tensor | None, Dropout | None]"
"""Plan, scale, head offsets and dropout of a call."""

Run = TypeVar("Run", bound=Callable[..., Any])

_BACKENDS = {"triton": "launch", "cudnn": "library", "torch": "torch_backend", "deferred": "ops"}


@lru_cache
def _module(backend: str) -> Any:
    return import_module(f".{_BACKENDS[backend]}", __package__)


def backend_of(plan: Plan | ops.Deferred) -> Any:
    """The module with the `forward` and `backward` of a plan, imported when first asked; all have one signature."""
    return _module(plan.backend)


class HilbertAttentionFunction(torch.autograd.Function):
    """Dilated attention with its exact backward: `apply(q, k, v, index, mask, (plan, scale, offsets, dropout))`.

    Between forward and backward it keeps q, k, v, out and lse, and no branch's output: with the merged lse, each
    branch is an ordinary flash-attention backward (FlashAttention-2, arXiv 2307.08691, algorithm 2). What is no tensor
    is one argument, since autograd handles each of them both ways.
    """

    @classmethod
    def apply(cls, *given: Any) -> Any:
        """As `Function.apply`, which reads the signature of `forward` at every call, for defaults that are not there.

        Nor is a call recorded that has nothing to record.
        """
        if torch._C._are_functorch_transforms_active():
            return super().apply(*given)  # type: ignore[no-untyped-call]
        if forward_ad._current_level < 0 and not is_recorded(*given[:3]):
            return cls.forward(*given)
        return super(torch.autograd.Function, cls).apply(*given)  # type: ignore[misc]

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor | None,
        mask: Tensor | None,
        rest: Rest,
    ) -> tuple[Tensor, Tensor]:
        """Run the plan's forward, out and lse; see `launch.forward` for shapes."""
        plan, scale, offsets, dropout = rest
        out, lse = backend_of(plan).forward(
            plan, q, k, v, scale=scale, index=index, mask=mask, offsets=offsets, dropout=dropout
        )
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the backward needs."""
        q, k, v, index, mask, ctx.rest = inputs
        ctx.save_for_backward(q, k, v, *output, index, mask)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v; a gradient of lse is taken in."""
        if dout is None and dlse is None:
            return (None,) * 6
        plan, scale, offsets, dropout = ctx.rest
        if dlse is not None and plan.mix_grad == "detached":
            raise UnsupportedError('mix_grad="detached" has no gradient of lse; detach lse, or use mix_grad="exact"')
        q, k, v, out, lse, index, mask = ctx.saved_tensors
        if dout is None:
            dout = out.new_zeros(()).expand(out.shape)
        sides = {"scale": scale, "index": index, "mask": mask, "offsets": offsets, "dropout": dropout}
        with _unrecorded():
            gradients = backend_of(plan).backward(plan, q, k, v, out, lse, dout, dlse, **sides)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _DifferentiatedOnce.apply(*gradients, q, k, v, dout, dlse)  # type: ignore[no-untyped-call]
        return (*gradients, None, None, None)


class _DifferentiatedOnce(torch.autograd.Function):
    """Gradients as they are, in a graph that refuses a second derivative: silence would be a wrong number."""

    @staticmethod
    def forward(dq: Tensor, dk: Tensor, dv: Tensor, *_: Tensor | None) -> tuple[Tensor, ...]:
        """The gradients; what they depend on makes them part of its graph."""
        return dq.clone(), dk.clone(), dv.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Refuse."""
        raise UnsupportedError(
            'dilated attention has no second derivative; backend="reference" computes it for small sizes'
        )


def is_recorded(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """A backward may follow."""
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _unrecorded() -> AbstractContextManager[Any]:
    """`torch.no_grad()` where gradients are recorded, which in a backward they seldom are."""
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The inputs are cast once, before; autocast would also round the float32 that torch's operators compute in."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def without_autocast(run: Run) -> Run:
    """A backend's `forward` or `backward` of torch's operators; kernels of our own are none that autocast casts."""

    @wraps(run)
    def plain(plan: Plan, q: Tensor, *given: Any, **sides: Any) -> Any:
        with no_autocast(q.device):
            return run(plan, q, *given, **sides)

    return cast("Run", plain)
