"""Comparing, counting and watching tensors, for the suites."""

from __future__ import annotations

import gc
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from registry.capture import capture as captured
from registry.outcome import Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor


def given(tensor: Tensor | None) -> Tensor:
    """A tensor that is there."""
    assert tensor is not None
    return tensor


def cosine_of(one: Tensor, two: Tensor) -> float:
    """Cosine similarity of two tensors as wholes, in float32."""
    from torch.nn.functional import cosine_similarity

    return float(cosine_similarity(one.double().flatten(), two.double().flatten(), dim=0))


def assert_close(got: Tensor, want: Tensor, what: str, cosine: float, relative_error: float) -> None:
    """Fail unless two tensors agree in direction and in their worst element."""
    assert bool(got.isfinite().all()), f"{what} (it holds infinities or NaNs)"
    similarity = cosine_of(got, want)
    error = float((got.float() - want.float()).abs().max() / want.float().abs().max())
    assert similarity >= cosine, f"{what} (cosine {similarity:.5f}, at least {cosine})"
    assert error <= relative_error, f"{what} (relative error {error:.4f}, at most {relative_error})"


def ulp(values: Tensor, dtype: Any) -> Tensor:
    """The distance between neighbouring numbers of `dtype` at each value's magnitude."""
    import torch

    return values.abs().log2().floor().exp2() * torch.finfo(dtype).eps


@contextmanager
def new_tensors() -> Iterator[Callable[[], list[Tensor]]]:
    """Watch what comes to life inside: the function given tells the tensors alive now and not before.

    What the garbage collector knows at the start is set aside (`gc.freeze`), so what it knows later is new.
    A tensor that only C++ holds escapes it.
    """
    import torch

    def alive() -> list[Tensor]:
        gc.collect()
        # type(), because isinstance asks lazy modules and proxies for a class that they would import
        return [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]

    gc.collect()
    gc.freeze()
    try:
        yield alive
    finally:
        gc.unfreeze()


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of the storages behind `tensors`."""
    found = {}
    for tensor in tensors:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            continue  # sparse and wrapper tensors have none
        if tensor.device.type != "meta" and storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def bytes_beside(live: Iterable[Tensor], known: Iterable[Tensor]) -> int:
    """Bytes of the storages in `live` that are not in `known`."""
    accounted = storages(known)
    return sum(size for address, size in storages(live).items() if address not in accounted)


@contextmanager
def no_synchronisation(what: str) -> Iterator[None]:
    """Fail if torch synchronises the host with the device inside."""
    import torch

    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    except RuntimeError as error:
        raise AssertionError(f"{what} waits for the device: {error}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(step: Callable[[], Tensor]) -> tuple[Any, Tensor]:
    """Record `step` into a CUDA graph, after three runs on a side stream as PyTorch asks for.

    Returns:
        The graph and the tensor that a replay writes.
    """
    outputs: list[Tensor] = []
    try:
        graph = captured("the step", step, lambda: outputs.append(step()))
    except Refused as error:
        raise AssertionError(f"the step cannot be captured into a CUDA graph: {error.__cause__}") from error
    return graph, outputs[-1]


@contextmanager
def traced(call: Callable[..., Tensor]) -> Iterator[Callable[..., Tensor]]:
    """`call` as torch.compile sees it, its graphs run as they are: Inductor's own code would take seconds."""
    import torch

    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's, which are not the plugin's
        try:
            yield torch.compile(call, backend="aot_eager")
        except torch._dynamo.exc.TorchDynamoException as error:
            raise AssertionError(f"it cannot be compiled: {error}") from error
        finally:
            torch.compiler.reset()
