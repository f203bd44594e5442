"""An attention kernel alone: how it is planned, checked, timed and told."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from planning import CPU, Plan, refused
from sweeps import Start

from backends.attention.sdpa import Sdpa, SdpaOptions
from registry import kernel_cell, metrics
from registry.api import AttentionKernel, AttentionShape
from registry.architecture import Architecture
from registry.kernel_cell import CACHES, measure_kernel
from registry.outcome import BadInput, Outcome, Refused
from registry.schema import ProtocolConfig

pytestmark = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated")

ALONE = ("model=tiny", "protocol=attention", "context=16")


def protocol(**changes: Any) -> ProtocolConfig:
    given = {"name": "attention", "measures": "attention", "context": 16, "batch_size": 2}
    return ProtocolConfig(**(given | {"warmup_steps": 2, "measured_steps": 5, "seed": 0, "timeout_s": 60} | changes))


def measured(kernel: AttentionKernel, architecture: Architecture, execution: str = "eager", **changes: Any) -> Any:
    device = "cuda" if execution == "cuda_graph" else "cpu"
    with torch.inference_mode():
        return measure_kernel(kernel, architecture, protocol(**changes), execution, device, lambda _: None)


class Watched(Sdpa):
    """Remembers what it was called with."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.shape: AttentionShape | None = None
        self.calls: list[tuple[tuple[int, ...], int]] = []

    def plan(self, shape: AttentionShape) -> None:
        self.shape = shape
        super().plan(shape)

    def decode(self, q: Any, k: Any, v: Any, **keywords: Any) -> Any:
        assert keywords["kv_len"] is None
        assert keywords.get("mask") is None
        assert keywords["scale"] == pytest.approx(1 / math.sqrt(q.shape[-1]))
        assert q.transpose(1, 2).is_contiguous()
        self.calls.append((tuple(k.shape), k.data_ptr()))
        return super().decode(q, k, v, **keywords)


def test_calls_rotate_over_caches_of_the_context_and_the_token_itself(architecture: Architecture) -> None:
    kernel = Watched(SdpaOptions())
    found = measured(kernel, architecture, warmup_steps=CACHES, measured_steps=CACHES)
    a = architecture
    assert kernel.shape == AttentionShape(2, a.q_heads, a.kv_heads, a.head_dim, 17, torch.bfloat16, "cpu", "dynamic")
    assert {shape for shape, _ in kernel.calls} == {(2, a.kv_heads, 17, a.head_dim)}
    timed = [pointer for _, pointer in kernel.calls[2 + CACHES : 2 + 2 * CACHES]]
    assert len(set(timed)) == CACHES, "a call met a cache that another one of the same round had"
    assert len(found["call_times_us"]) == CACHES
    assert all(time > 0 for time in found["call_times_us"])
    cache_bytes = 2 * 2 * a.kv_heads * 17 * a.head_dim * 2
    assert found["rotated_bytes"] == CACHES * cache_bytes
    assert found["call_bytes"] == cache_bytes + 2 * 2 * a.q_heads * a.head_dim * 2
    assert found["fidelity"]["output_cosine"] > 0.9999
    assert found["event_call_times_us"] is None
    assert any("attention" in name for name in found["kernels"])


def test_who_else_is_on_the_device_is_asked_before_the_calls_are_timed(
    architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, before = Watched(SdpaOptions()), []
    monkeypatch.setattr(
        kernel_cell, "load_beside", lambda device: before.append(len(kernel.calls)) or {"seen": device}
    )
    assert measured(kernel, architecture)["load_window"] == {"seen": "cpu"}
    assert before == [2]  # those of the check


@pytest.mark.parametrize("pinned", ["default", "math"])
def test_what_pytorch_may_choose_from_is_told_as_the_call_finds_it(architecture: Architecture, pinned: str) -> None:
    found = measured(Sdpa(SdpaOptions(pinned)), architecture)["sdp_enabled"]
    others = pinned == "default"
    assert found == {"flash": others, "efficient": others, "cudnn": others, "math": True}


def test_a_kernel_that_is_not_pytorch_s_leaves_no_choice(architecture: Architecture) -> None:
    assert measured(Plain(SdpaOptions()), architecture)["sdp_enabled"] == {}


class Plain(Sdpa):
    """Attention out of plain products."""

    def decode(self, q: Any, k: Any, v: Any, *, scale: float, **keywords: Any) -> Any:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return (q @ k.mT).mul(scale).softmax(-1) @ v


class Wrong(Sdpa):
    """Off by a factor that a cosine does not see, by a row, or not a number."""

    how = ""

    def decode(self, q: Any, k: Any, v: Any, **keywords: Any) -> Any:
        if self.how == "last row":
            return super().decode(q, k[:, :, :-1], v[:, :, :-1], **keywords)
        out = super().decode(q, k, v, **keywords)
        return out * (1.1 if self.how == "factor" else math.nan)


@pytest.mark.parametrize("how", ["factor", "last row", "nan"])
def test_a_kernel_that_is_wrong_is_not_timed(architecture: Architecture, how: str) -> None:
    kernel = Wrong(SdpaOptions())
    kernel.how = how
    with pytest.raises(Refused, match="the kernel's output has a cosine") as caught:
        measured(kernel, architecture)
    assert caught.value.refusal.outcome is Outcome.INCORRECT


class WrongOnce(Sdpa):
    """Right on every cache that it meets but one, counted from 0."""

    place = 0

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.met = 0

    def decode(self, q: Any, k: Any, v: Any, **keywords: Any) -> Any:
        self.met += 1
        out = super().decode(q, k, v, **keywords)
        return out * 1.1 if self.met == self.place + 1 else out


@pytest.mark.parametrize("place", [0, 1])
def test_a_kernel_is_checked_on_the_first_cache_and_on_the_last(architecture: Architecture, place: int) -> None:
    kernel = WrongOnce(SdpaOptions())
    kernel.place = place
    with pytest.raises(Refused, match="the kernel's output has a cosine"):
        measured(kernel, architecture)
    watched = Watched(SdpaOptions())
    measured(watched, architecture, warmup_steps=CACHES, measured_steps=CACHES)
    checked, rotation = ([pointer for _, pointer in watched.calls[a:b]] for a, b in ((0, 2), (2, 2 + CACHES)))
    assert checked == [rotation[0], rotation[-1]]


@pytest.mark.gpu
def test_a_graph_holds_a_call_for_each_cache(architecture: Architecture) -> None:
    shape = replace(architecture, q_heads=8, kv_heads=2, head_dim=128)
    kernel = Watched(SdpaOptions())
    found = measured(kernel, shape, "cuda_graph", batch_size=1)
    assert found["calls_a_launch"] == CACHES
    assert len(found["event_call_times_us"]) == len(found["call_times_us"]) == 5
    eager = measured(Watched(SdpaOptions()), shape, "eager", batch_size=1)
    assert min(found["call_times_us"]) < min(eager["call_times_us"])


class Waits(Sdpa):
    """Needs the host in a call."""

    def decode(self, q: Any, k: Any, v: Any, **keywords: Any) -> Any:
        assert float(q.sum()) == float(q.sum())
        return super().decode(q, k, v, **keywords)


@pytest.mark.gpu
def test_a_call_that_needs_the_host_cannot_be_captured(architecture: Architecture) -> None:
    with pytest.raises(Refused, match="cannot be captured"):
        measured(Waits(SdpaOptions()), architecture, "cuda_graph")


# Planning


def test_neither_body_nor_format_has_a_say(plan: Plan) -> None:
    cell = plan(*ALONE, "quant=exl2", device=CPU)
    assert cell.refusal is None
    assert (cell.kernel_alone, cell.capacity) == (True, 17)
    assert "attention alone" in cell.label


def test_a_long_cache_is_refused_by_its_own_size(plan: Plan) -> None:
    """A cache of every layer but no weights: what the model's own weights need does not count."""
    step = plan("model=llama-3.1-8b", "context=16384")
    alone = plan("model=llama-3.1-8b", "protocol=attention", "context=16384")
    assert alone.memory_need < step.memory_need / 5
    assert alone.memory_need == pytest.approx(32 * 2 * 8 * 128 * 16385 * 2)


def test_a_graph_needs_a_gpu_but_no_length_on_the_device(plan: Plan) -> None:
    assert plan(*ALONE, "execution=cuda_graph", "execution.cache=dynamic").refusal is None
    cell = plan(*ALONE, "execution=cuda_graph", "execution.cache=dynamic", device=CPU)
    assert "needs a CUDA device" in refused(cell, Outcome.UNSUPPORTED).reason


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["execution.cache=static"], "execution.cache=dynamic"),
        (["protocol.measures=prefill"], "protocol.measures=prefill: Known: attention, step"),
        (["context=4096"], "ends at"),
    ],
)
def test_what_cannot_be_meant_is_refused(plan: Plan, overrides: list[str], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        plan("model=tiny", "protocol=attention", *overrides)


# Figures


def test_figures_of_known_times(plan: Plan) -> None:
    cell = plan("model=llama-3.1-8b", "protocol=attention")
    found = metrics.kernel_metrics(
        cell,
        {
            "call_times_us": [8.0, 10.0, 12.0],
            "event_call_times_us": [7.0, 7.5, 8.0],
            "call_bytes": 8_400_000,
            "read_bandwidth_gbs": 4000.0,
            "fidelity": {"output_cosine": 0.99999, "output_error": 0.001},
        },
    )
    assert found["median_call_us"] == 10.0
    assert found["event_median_call_us"] == 7.5
    assert found["layers_total_ms"] == pytest.approx(0.32)
    assert found["call_gbs"] == pytest.approx(840.0)


def test_caches_that_fit_into_l2_are_told() -> None:
    measured = {"call_times_us": [10.0] * 5, "rotated_bytes": 60_000_000}
    [warning] = metrics.kernel_warnings(measured, 50_000_000)
    assert "rotate over have 60 MB, the L2 cache has 50" in warning
    assert metrics.kernel_warnings(measured, 30_000_000) == []
    assert metrics.kernel_warnings(measured, None) == []


def test_a_kernel_is_a_row_a_run_and_a_record_of_its_own_kind(start: Start) -> None:
    sweep = start("protocol=attention", "attention=sdpa,sdpa-cudnn", "context=16", "protocol.measured_steps=20").end()
    assert sweep.code == 0, sweep.stderr
    ok, refused_one = sweep.records()
    assert (ok["kind"], ok["outcome"], refused_one["kind"], refused_one["outcome"]) == (
        "attention",
        "ok",
        "attention",
        "unsupported",
    )
    assert ok["step_times_ms"] == []
    run = sweep.runs()[ok["record_id"]]
    assert run.data.metrics["median_call_us"] == pytest.approx(ok["metrics"]["median_call_us"])
    assert "call_time_us" in run.data.metrics
    assert "us/call" in sweep.stdout
