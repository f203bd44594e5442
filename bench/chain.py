"""A fused step of which a kind of launch can be left out, and the bytes that each kind reads."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from replays import zeros

from backends.fused.step import Hosted
from backends.int4.stacked import Stored
from registry.hosting import tensor_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from backends.fused.body import FusedBackend

OWN = {
    "qkv": "_qkv",
    "attention": "_attend",
    "swiglu": "_swiglu",
    "head": "_head",
    "norm": "_norm",
    "rotary": "_rotate",
    "silu": "_silu",
}
"""Of the step's methods; `out` and `down` are its `_residual`."""
STACKED = {"qkv": ("qkv", "bias"), "out": ("out",), "swiglu": ("gate_up",), "down": ("down",)}
"""Of a block that the step multiplies itself: what a product reads."""
LAYERS = ("q", "k", "v", "out", "gate", "up", "down")
"""Of a block that a format's layers multiply."""
OVERWRITTEN = ("q", "gate")
"""Layers into whose outputs the step's own kernels write."""


class Chain:
    """Leaving a launch out changes what is computed, and not what the others read.

    A format's layer that is left out gives what it gave once, in its own block.

    Args:
        backend: Loaded, with something in its cache.
    """

    def __init__(self, backend: FusedBackend) -> None:
        self._backend, self._step = backend, backend.step
        self._weights = w = backend.step._weights
        self.hosted = isinstance(w.blocks[0], Hosted)
        self._kept: dict[tuple[int, str], Tensor] = {}
        if self.hosted:
            self._call_instead(LAYERS, self._keeping)
        self._logits = backend.decode_step(zeros(backend)).clone()
        self._step._weights = w
        self._given = {place: kept.clone() for place, kept in self._kept.items()}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of launches, in the order of a block."""
        if not self.hosted:
            return ("qkv", "attention", "out", "swiglu", "down", "head")
        around = ("norm", "q", "k", "v", "rotary", "attention", "out", "gate", "up", "silu", "down")
        return (*around, "head")

    @contextmanager
    def without(self, kind: str) -> Iterator[None]:
        """The step as it is without one kind of launch."""
        step, w = self._step, self._weights
        logits, residual = self._logits, step._residual
        instead: dict[str, Callable[..., Any]] = {
            "head": lambda *_: logits,
            "norm": lambda *_: step._normed,
            "silu": lambda gate, _: gate,
        }
        if self.hosted and kind in LAYERS:
            self._call_instead((kind,), lambda place, _: lambda _: self._given[place])
        elif kind == "head" and callable(w.head):
            step._weights = replace(w, head=instead["head"])
        elif kind in OWN:
            setattr(step, OWN[kind], instead.get(kind, lambda *_: None))
        else:
            step._residual = lambda product, *rest: None if product == kind else residual(product, *rest)
        try:
            yield
        finally:
            step._weights = w
            for name in (*OWN.values(), "_residual"):
                vars(step).pop(name, None)

    @contextmanager
    def serial(self) -> Iterator[None]:
        """The step whose kernels do not come up while the one ahead still runs."""
        early, self._step._pdl = self._step._pdl, {"PDL": False}
        try:
            yield
        finally:
            self._step._pdl = early

    def begin(self, context: int) -> None:
        """As before the first step: the cache's length, and what layers that are left out give."""
        self._backend.seek(context)
        for place, given in self._given.items():
            if place[1] in OVERWRITTEN:
                given.copy_(self._kept[place])

    def bytes_of(self, kind: str, context: int) -> int:
        """What a kind of launch reads of weights, as they are stored, or of the cache; 0 where it reads neither."""
        w, setup = self._weights, self._backend.setup
        if kind == "attention":
            itemsize = self._step._keys.itemsize
            return setup.architecture.kv_bytes_per_token(itemsize) * context * setup.batch_size
        if kind == "head":
            return self._stored(w.head)
        leaves = (kind,) if self.hosted and kind in LAYERS else STACKED.get(kind, ())
        return sum(self._stored(getattr(block, leaf)) for block in w.blocks for leaf in leaves)

    def _stored(self, weight: Any) -> int:
        if weight is None:
            return 0
        if isinstance(weight, torch.Tensor):
            return weight.nbytes
        if isinstance(weight, Stored):
            return sum(self._stored(tensor) for tensor in (weight.words, weight.scales, weight.bias))
        return tensor_bytes(self._backend.setup.linear.stored(weight))

    def _call_instead(self, names: tuple[str, ...], made: Callable[..., Callable[[Tensor], Tensor]]) -> None:
        """Have other callables in the place of layers, each made of its place and the layer."""
        w = self._weights
        blocks = [
            replace(block, **{name: made((index, name), getattr(block, name)) for name in names})
            for index, block in enumerate(w.blocks)
        ]
        self._step._weights = replace(w, blocks=blocks)

    def _keeping(self, place: tuple[int, str], layer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            out = layer(x)
            self._kept[place] = out.contiguous().clone()
            return out

        return call
