"""The contract of an attention kernel."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import pytest

from registry.api import (
    AttentionKernel,
    AttentionShape,
    Plugin,
    Refused,
)
from registry.testing.contract import Contract, gpu
from registry.testing.tensors import assert_close, capture, no_synchronisation, traced
from registry.validate import CACHES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor


class AttentionKernelContract(Contract):
    """The contract of `AttentionKernel`: what a float32 softmax over the valid rows gives.

    Class attributes:
        kv_heads: Key/value heads.
        groups: Query heads a key/value head.
        head_dims: Widths of a head.
        capacity: Rows of the cache; odd, because a context plus some steps is what it is.
        lengths: Valid rows to attend to; a step has two at least, a prompt's token and its own.
    """

    kind: ClassVar[type[Plugin]] = AttentionKernel
    kv_heads: ClassVar[int] = 2
    groups: ClassVar[Sequence[int]] = (1, 2, 4, 7, 8)
    head_dims: ClassVar[Sequence[int]] = (32, 64, 128)
    capacity: ClassVar[int] = 161
    lengths: ClassVar[Sequence[int]] = (2, 3, 17, 33, 129, 161)

    def kernels(self, cache: str, batch_size: int, execution: str = "eager") -> Iterator[_Planned]:
        """A planned kernel for every shape that the plugin takes."""
        device = self.place()
        for group, head_dim in itertools.product(self.groups, self.head_dims):
            planned = self.plan(group, head_dim, cache, batch_size, execution, device)
            if planned is not None:
                yield planned

    def plan(
        self, group: int, head_dim: int, cache: str, batch_size: int, execution: str, device: str
    ) -> _Planned | None:
        """The kernel planned for one shape, with its tensors; `None` if it refuses."""
        q_heads = group * self.kv_heads
        architecture = replace(
            self.architecture,
            q_heads=q_heads,
            kv_heads=self.kv_heads,
            head_dim=head_dim,
            hidden=q_heads * head_dim,
        )
        asked = self.request(
            device,
            architecture=architecture,
            attention=self.name,
            cache=cache,
            batch_size=batch_size,
            capacity=self.capacity,
            execution=execution,
        )
        shape = AttentionShape(
            batch_size, q_heads, self.kv_heads, head_dim, self.capacity, self.torch_dtype(), device, cache
        )
        if cache not in self.plugin.caches:
            return None
        kernel = self.plugin(asked.options)
        try:
            self.plugin.check(asked)
            kernel.plan(shape)
        except Refused:
            return None
        return _Planned(kernel, shape, cache, seed=group * 1000 + head_dim)

    def test_some_shape_is_served(self) -> None:
        """Not everything is refused, so that the other tests have something to say."""
        served = [planned for cache in CACHES for planned in self.kernels(cache, batch_size=1)]
        assert served, f"{self.plugin.__name__} refuses every shape and cache that the suite has"

    @pytest.mark.parametrize("batch_size", [1, 3])
    @pytest.mark.parametrize("cache", CACHES)
    def test_decode_is_attention(self, cache: str, batch_size: int) -> None:
        """The output is attention over the valid rows and over nothing else.

        One plan serves every length. In a static cache the rows behind the valid ones hold large numbers:
        a kernel that reads them is far off. The scale is not the usual one, so that it is used, not guessed.
        """
        import torch

        served = False
        for planned in self.kernels(cache, batch_size):
            for length in self.lengths:
                served = True
                call = planned.call(length)
                with torch.inference_mode():
                    out = call.decode()
                what = f"{planned}, {length} valid rows"
                assert out.shape == call.q.shape, f"{what}: the output is {list(out.shape)}"
                assert out.dtype == call.q.dtype, f"{what}: {call.q.dtype} in, {out.dtype} out"
                what = f"{what}: the output is not the attention over the valid rows"
                assert_close(out, call.reference(), what, self.cosine, self.relative_error)
        if not served:
            pytest.skip(f"{self.plugin.__name__} refuses the {cache} cache at batch {batch_size}")

    @pytest.mark.parametrize("cache", CACHES)
    def test_decode_leaves_everything_as_it_was(self, cache: str) -> None:
        """Inputs stay untouched, and a call does not depend on the calls before it: layers share a kernel."""
        import torch

        served = False
        for planned in self.kernels(cache, batch_size=1):
            served = True
            short, long = planned.call(self.lengths[1]), planned.call(self.lengths[-1])
            inputs = [tensor.clone() for tensor in (long.q, long.k, long.v)]
            with torch.inference_mode():
                first = long.decode().clone()
                short.decode()
                again = long.decode()
            for name, old, new in zip("qkv", inputs, (long.q, long.k, long.v), strict=True):
                assert torch.equal(old, new), f"{planned}: decode changes its {name}"
            what = f"{planned}: the same call gives something else after another one"
            assert_close(again, first, what, self.cosine, 2 * torch.finfo(first.dtype).eps)
        if not served:
            pytest.skip(f"{self.plugin.__name__} refuses the {cache} cache")

    @gpu
    @pytest.mark.parametrize("cache", CACHES)
    def test_decode_never_waits_for_the_device(self, cache: str) -> None:
        """No call synchronises with the host."""
        import torch

        self.place_on_gpu()
        served = False
        for planned in self.kernels(cache, batch_size=1):
            served = True
            call = planned.call(self.lengths[2])
            with torch.inference_mode():
                call.decode()
                with no_synchronisation(f"{planned}: decode"):
                    call.decode()
        if not served:
            pytest.skip(f"{self.plugin.__name__} refuses the {cache} cache")

    @gpu
    def test_decode_can_be_captured(self) -> None:
        """A captured call reads the length from the device: one graph serves every length."""
        import torch

        self.place_on_gpu()
        if "cuda_graph" not in self.plugin.executions:
            pytest.skip(f"{self.plugin.__name__} does not declare cuda_graph")
        served = False
        for planned in self.kernels("static", batch_size=1, execution="cuda_graph"):
            served = True
            call = planned.call(self.lengths[-1])
            with torch.inference_mode():
                graph, out = capture(call.decode)
                for length in self.lengths:
                    call.become(planned.call(length))
                    graph.replay()
                    what = f"{planned}: the replayed graph, given {length} valid rows, does not attend to those"
                    assert_close(out, call.reference(), what, self.cosine, self.relative_error)
        if not served:
            pytest.skip(f"{self.plugin.__name__} refuses the static cache")

    @pytest.mark.parametrize("cache", CACHES)
    def test_decode_can_be_compiled(self, cache: str) -> None:
        """A call that torch.compile has traced attends at every length: to a static cache's rows by what it is given.

        One shape, for each takes a while.
        """
        import torch

        if "compile" not in self.plugin.executions:
            pytest.skip(f"{self.plugin.__name__} does not declare compile")
        planned = self.plan(self.groups[-1], self.head_dims[-1], cache, 1, "compile", self.place())
        if planned is None:
            pytest.skip(f"{self.plugin.__name__} refuses the {cache} cache or the shape")
        with torch.inference_mode(), traced(planned.kernel.decode) as decode:
            for length in self.lengths:
                call = planned.call(length)
                out = decode(call.q, call.k, call.v, kv_len=call.kv_len, scale=call.scale, mask=call.mask)
                what = f"{planned}: the compiled call, given {length} valid rows, does not attend to those"
                assert_close(out, call.reference(), what, self.cosine, self.relative_error)


@dataclass(frozen=True)
class _Planned:
    """A kernel and the shape that it was planned for."""

    kernel: AttentionKernel
    shape: AttentionShape
    cache: str
    seed: int

    def __str__(self) -> str:
        s = self.shape
        return f"{s.q_heads}/{s.kv_heads} heads of {s.head_dim}, batch {s.batch_size}, {self.cache} cache"

    def call(self, length: int) -> _Call:
        """Seeded arguments with `length` valid rows.

        A static cache has all its rows, the invalid ones full of numbers a thousand times too large.
        """
        import torch

        s = self.shape
        rows = s.capacity if self.cache == "static" else length
        numbers = torch.Generator().manual_seed(self.seed + length)
        q = torch.randn(s.batch_size, 1, s.q_heads, s.head_dim, generator=numbers).transpose(1, 2)
        k, v = torch.randn(2, s.batch_size, s.kv_heads, rows, s.head_dim, generator=numbers)
        k[:, :, length:] *= 1000
        v[:, :, length:] *= 1000
        q, k, v = (tensor.to(s.device, s.dtype) for tensor in (q, k, v))
        if self.cache == "dynamic":
            return _Call(self.kernel, q, k, v, None, None, length)
        mask = (torch.arange(rows, device=s.device) < length).expand(s.batch_size, 1, 1, rows).contiguous()
        kv_len = torch.tensor(length, device=s.device)
        return _Call(self.kernel, q, k, v, kv_len, mask if self.kernel.needs_mask else None, length)


@dataclass
class _Call:
    """The arguments of one `decode`."""

    kernel: AttentionKernel
    q: Tensor
    k: Tensor
    v: Tensor
    kv_len: Tensor | None
    mask: Tensor | None
    length: int

    @property
    def scale(self) -> float:
        """Half of the usual factor."""
        return float(0.5 / math.sqrt(self.q.shape[-1]))

    def decode(self) -> Tensor:
        return self.kernel.decode(self.q, self.k, self.v, kv_len=self.kv_len, scale=self.scale, mask=self.mask)

    def become(self, other: _Call) -> None:
        """Take over the other call's values in this one's tensors, as a replayed graph needs it."""
        for mine, theirs in zip(
            (self.q, self.k, self.v, self.kv_len, self.mask),
            (other.q, other.k, other.v, other.kv_len, other.mask),
            strict=True,
        ):
            if mine is not None and theirs is not None:
                mine.copy_(theirs)
        self.length = other.length

    def reference(self) -> Tensor:
        """Softmax attention over the valid rows in float32, `[batch, q_heads, 1, head_dim]`."""
        q, k, v = self.q.float(), self.k[:, :, : self.length].float(), self.v[:, :, : self.length].float()
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return (q @ k.mT).mul(self.scale).softmax(-1) @ v
