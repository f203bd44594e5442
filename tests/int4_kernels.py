"""A stand-in for the compiled int4 kernels: what they compute, in plain torch, on the tensors that they are given."""

from typing import Any

from backends.int4 import layout

UNIT = 2.0**24
"""Sums of squares are counts of 1 / UNIT."""


class Int4Kernels:
    """The extension's functions, by their names."""

    @staticmethod
    def product(x: Any, words: Any, scales: Any, bias: Any, *launch: int) -> Any:
        out = x.float() @ layout.weight(words, scales).T
        return (out if bias is None else out + bias.float()).to(x.dtype)

    @classmethod
    def residual(
        cls, x: Any, words: Any, scales: Any, residual: Any, gain: Any, scaled: Any, squares: Any, *launch: int
    ) -> None:
        residual += cls.product(x.float(), words, scales, None)
        scaled.copy_(residual * gain.float())
        squares[: len(x)] += (residual.square().sum(1) * UNIT).round().long()

    @classmethod
    def normed(cls, x: Any, squares: Any, eps: float, words: Any, scales: Any, bias: Any) -> Any:
        """`[streams, tiles, 2, 8]`: what meets in a tile."""
        out = cls.product(x.float(), words, scales, None)
        if squares is not None:
            out *= (squares[: len(x), None] / (UNIT * x.shape[1]) + eps).rsqrt()
        return (out if bias is None else out + bias.float()).unflatten(-1, (-1, 2, 8))

    @staticmethod
    def take(tickets: Any) -> None:
        """As blocks take tiles: from 0 on in every step."""
        assert int(tickets[0]) == 0
        tickets[0] += 5

    @classmethod
    def swiglu(
        cls, x: Any, squares: Any, eps: float, words: Any, scales: Any, out: Any, tickets: Any, *launch: int
    ) -> None:
        cls.take(tickets)
        gate, up = cls.normed(x, squares, eps, words, scales, None).unbind(2)
        out.copy_((gate * gate.sigmoid() * up).flatten(1))

    @classmethod
    def logits(
        cls, x: Any, squares: Any, eps: float, words: Any, scales: Any, out: Any, tickets: Any, *launch: int
    ) -> None:
        cls.take(tickets)
        out.copy_(cls.normed(x, squares, eps, words, scales, None).flatten(1))

    @classmethod
    def qkv(
        cls,
        x: Any,
        squares: Any,
        eps: float,
        words: Any,
        scales: Any,
        bias: Any,
        cos: Any,
        sin: Any,
        length: Any,
        q: Any,
        keys: Any,
        values: Any,
        *launch: int,
    ) -> None:
        import torch  # when it is called: a test module that has this one is held to be light

        row, half, kv = int(length), keys.shape[3] // 2, keys.shape[1]
        found = cls.normed(x, squares, eps, words, scales, bias)
        # [streams, heads, half] each
        one, two = (found[:, :, member].flatten(1).unflatten(-1, (-1, half)) for member in (0, 1))
        heads = one.shape[1] - kv
        c, s = cos[row], sin[row]
        turned = torch.cat([(one * c - two * s)[:, :heads], (two * c + one * s)[:, :heads]], -1)
        q.copy_(turned[:, : heads - kv].flatten(1))
        keys[:, :, row] = turned[:, heads - kv :].to(keys.dtype)
        values[:, :, row] = torch.cat([one[:, heads:], two[:, heads:]], -1).to(values.dtype)
