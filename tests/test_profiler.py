"""Profiled steps: reading torch's trace, a measurement with a profile, and where the trace ends up."""

import gc
import gzip
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import Start, Sweep, database
from test_measure import CONTEXT, PROTOCOL, STEPS_A_PASS, Counter, following, setup
from torch import Tensor

from registry.api import Architecture, Backend
from registry.measure import measure
from registry.profile import Interval, doubts, figures
from registry.profiler import BLOCK_STEPS, LEAD, LEAD_STEPS, STEP, TRACED_STEPS, blocks, intervals
from registry.schema import ExecutionConfig

# sqlalchemy about what MLflow does
pytestmark = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated")


@pytest.fixture(scope="module")
def small(architecture: Architecture) -> Architecture:
    return replace(architecture, vocab=97)


def run(backend: Backend, steps: int, execution: str = "eager", trace: Path | None = None, **changes: Any) -> Any:
    protocol = replace(PROTOCOL, profiled_steps=steps, **changes)
    with torch.inference_mode():
        launched = ExecutionConfig(execution, execution, backend.setup.cache)
        return measure(backend, launched, protocol, 20.5, lambda name: told(backend, name), trace)


def told(backend: Any, name: str) -> None:
    backend.asked.append(("stage", name))


def unzipped(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(gzip.decompress(file.read_bytes()))
    return content


def annotated(trace: dict[str, Any]) -> list[str]:
    return [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]


# The trace


def event(category: str, name: str, ts: float, dur: float, tid: Any = 7, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "pid": 0, "tid": tid, "ts": ts, "dur": dur, "args": args}


CUDA_TRACE = {
    "schemaVersion": 1,
    "deviceProperties": [{"id": 0, "name": "NVIDIA H200"}],
    "traceEvents": [
        {"ph": "M", "name": "process_name", "ts": 1.0, "pid": 0, "tid": 0, "args": {"name": "python"}},
        event("user_annotation", LEAD, 0.5, 10.0, 1),
        event("user_annotation", STEP, 100.5, 50.25, 1),
        event("cpu_op", "aten::mm", 101.0, 8.0, 1),
        event("cuda_runtime", "cudaLaunchKernel", 102.0, 3.0, 1, correlation=41),
        event("cuda_driver", "cuLaunchKernel", 106.0, 2.0, 1, correlation=42),
        event("overhead", "Activity Buffer Request", 108.0, 1.0, -1),
        event("kernel", "nvjet_tst_64x8", 110.0, 20.0, stream=7, correlation=41, device=0),
        event("kernel", "_gemv_kernel", 131.0, 5.5, stream=7, correlation=42, device=0),
        event("gpu_memcpy", "Memcpy DtoD", 140.0, 1.0, bytes=4096, correlation=43),
        event("gpu_memset", "Memset (Device)", 142.0, 0.5, bytes=16, correlation=44),
        event("gpu_user_annotation", STEP, 110.0, 32.5),
        {"ph": "s", "id": 41, "cat": "ac2g", "name": "ac2g", "pid": 0, "tid": 1, "ts": 102.0},
        {"ph": "i", "name": "Record Window End", "ts": 160.0, "s": "g", "pid": "", "tid": ""},
    ],
}
"""As Kineto writes it, in the little that is read of it."""


def test_a_trace_of_cuda_is_read_by_its_categories() -> None:
    assert intervals(CUDA_TRACE) == [
        Interval(STEP, 100.5, 150.75, "step"),
        Interval("aten::mm", 101, 109, "operator", thread=1),
        Interval("cudaLaunchKernel", 102, 105, "call", correlation=41),
        Interval("cuLaunchKernel", 106, 108, "call", correlation=42),
        Interval("nvjet_tst_64x8", 110, 130, "kernel", correlation=41),
        Interval("_gemv_kernel", 131, 136.5, "kernel", correlation=42),
        Interval("Memcpy DtoD", 140, 141, "memcpy", correlation=43, nbytes=4096),
        Interval("Memset (Device)", 142, 142.5, "memset", correlation=44, nbytes=16),
    ]


@pytest.mark.parametrize(
    ("steps", "room", "sizes"),
    [
        (1, 35, [1]),
        (3, 35, [3]),
        (4, 35, [3, 1]),
        (50, 35, [3, 20, 20, 7]),
        (3, 1, [1, 1, 1]),
        (30, 7, [3, 7, 7, 7, 6]),
    ],
)
def test_blocks_fit_into_the_cache(steps: int, room: int, sizes: list[int]) -> None:
    assert (TRACED_STEPS, BLOCK_STEPS) == (3, 20)
    assert list(blocks(steps, room)) == sizes


# A measurement


def test_a_profile_comes_after_all_that_is_timed(small: Architecture) -> None:
    backend = Counter(setup(small))
    run(backend, 4)
    asked = [(what, *rest) for what, *rest in backend.asked if what != "prefill"]
    place = asked.index(("stage", "profile"))
    assert asked[:place].count(("stage", "kernels")) == 1
    assert [what for what, *_ in asked[:place]].count("step") == 2 * STEPS_A_PASS + 1
    first = asked[asked.index(("stage", "measure")) + 1][1]
    steps = [("step", token, CONTEXT + n) for n, token in enumerate(following(first, TRACED_STEPS)[:-1])]
    assert asked[place + 1 :] == [
        *(("seek", CONTEXT), *steps[:LEAD_STEPS], ("seek", CONTEXT), *steps),
        *(("seek", CONTEXT), *steps[:LEAD_STEPS], ("seek", CONTEXT), *steps[:1]),
    ]
    assert backend.collecting[-4:] == [False] * 4
    assert gc.isenabled()


def test_a_profile_on_the_cpu_tells_operators(small: Architecture) -> None:
    measured = run(Counter(setup(small)), 5)
    found = measured["profile"]
    assert found["steps"] == 5
    assert found["operators"]["aten::argmax"]["count"] == 1
    assert 0 < found["operator_us"] < found["wall_us"]
    assert found["inflation"] == found["wall_us"] / 1e3 / statistics.median(measured["step_times_ms"])
    assert not {name for name in found if name.endswith(("gap_us", "busy_us", "kernels", "kernels_per_step"))}


def test_more_steps_than_the_cache_has_room_for(small: Architecture) -> None:
    assert run(Counter(setup(small)), 10, warmup_steps=0, measured_steps=1)["profile"]["steps"] == 10


def test_without_profiled_steps_nothing_is_profiled(small: Architecture, tmp_path: Path) -> None:
    backend = Counter(setup(small))
    assert "profile" not in run(backend, 0, trace=tmp_path / "trace.json.gz")
    assert ("stage", "profile") not in [(what, *rest) for what, *rest in backend.asked if what == "stage"]
    assert list(tmp_path.iterdir()) == []


def test_the_trace_of_the_first_steps_is_kept_and_nothing_beside_it(small: Architecture, tmp_path: Path) -> None:
    run(Counter(setup(small)), 7, trace=tmp_path / "trace.json.gz")
    [file] = tmp_path.iterdir()
    trace = unzipped(file)
    assert annotated(trace) == [LEAD] * LEAD_STEPS + [STEP] * TRACED_STEPS
    assert "host_name" not in trace
    assert any(event["name"] == "aten::remainder" for event in trace["traceEvents"])


def test_a_profiler_that_sees_nothing_costs_a_warning_and_no_figure(
    small: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Any, path: str) -> None:
        Path(path).write_text('{"traceEvents": [')

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", broken)
    found = run(Counter(setup(small)), 3, trace=tmp_path / "trace.json.gz")["profile"]
    assert found == {"steps": 0}
    assert "torch.profiler wrote a trace that is no JSON" in capsys.readouterr().out
    assert doubts(found, 1.0) == ["torch.profiler saw no step here: there is no profile"]


# A sweep


@pytest.fixture(scope="module")
def sweep(start: Start) -> Sweep:
    return start("protocol.profiled_steps=3").end()


def test_a_profiled_cell_ends_well(sweep: Sweep) -> None:
    assert sweep.code == 0, sweep.stderr
    assert sweep.left_processes == []
    assert not [file for file in (sweep.folder / "tmp").iterdir() if file.name.startswith("rfloor-")]


def test_a_record_has_its_profile_and_its_metrics(sweep: Sweep) -> None:
    [record] = sweep.records()
    found, figures = record["measured"]["profile"], record["metrics"]
    assert found["steps"] == 3
    assert found["operators"]["aten::argmax"]["count"] == 1
    assert figures["bw_util"] == figures["r_floor"]
    assert figures["profiler_inflation"] == pytest.approx(figures["bw_util"] / figures["bw_util_profiled"])
    stages = [*record["measured"]["stages_s"]]
    assert stages[stages.index("measure") :] == ["measure", "kernels", "profile", "bandwidth"]


def test_the_trace_is_an_artifact_of_its_run(sweep: Sweep, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(database(sweep.home))
    [run] = sweep.runs().values()
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"cell.json", "config.yaml", "worker.log", "trace.json.gz"}
    logged = Path(client.download_artifacts(run.info.run_id, "trace.json.gz", str(tmp_path)))
    assert annotated(unzipped(logged)) == [LEAD] * LEAD_STEPS + [STEP] * 3
    assert {"profiler_inflation", "bw_util", "bw_util_profiled"} <= set(run.data.metrics)


def test_the_trace_lies_beside_the_record_and_is_none(sweep: Sweep) -> None:
    from registry.importing import import_records
    from registry.schema import TrackingConfig

    [record] = sweep.records()
    stem = f"{record['sweep_id']}-{record['index']}"
    names = {file.name for file in (sweep.folder / "records" / record["cell_id"]).glob(f"{stem}.*")}
    assert names == {f"{stem}.json", f"{stem}.log", f"{stem}.trace.json.gz"}
    where = TrackingConfig("local", database(sweep.home), "rfloor", str(sweep.home / "artifacts"))
    counts, problems = import_records(sweep.folder / "records", where)
    assert (counts, problems) == ({"present": 1}, [])


def test_a_report_says_whether_the_trace_was_kept(start: Start, tmp_path: Path) -> None:
    """At the end of a sweep, out of MLflow, and out of records that somebody kept without their traces."""
    from registry import cli

    one = start("experiment=profile", "execution=eager", "protocol.profiled_steps=2").end()
    assert one.code == 0, one.stderr
    [own] = one.folder.glob("records/experiments/*/report.md")
    uri = f"tracking.uri={database(one.home)}"
    assert cli.main(["report", "profile", f"out={tmp_path / 'kept'}", uri]) == 0
    for told in (own, tmp_path / "kept" / "report.md"):
        assert "Its trace is kept, beside its record" in told.read_text()
    [trace] = one.folder.glob("records/*/*.trace.json.gz")
    trace.unlink()
    uri = f"tracking.uri={database(tmp_path)}"
    assert cli.main(["import", str(one.folder / "records"), uri, f"tracking.artifacts={tmp_path}/a"]) == 0
    assert cli.main(["report", "profile", f"out={tmp_path / 'bare'}", uri]) == 0
    assert "Its trace was not kept with these records." in (tmp_path / "bare" / "report.md").read_text()


# On CUDA


class Chain(Counter):
    """Each block multiplies by a matrix of half a gigabyte: kernels that no profiler can make much longer."""

    width = 1 << 14

    def __init__(self, setup: Any) -> None:
        super().__init__(setup)
        self.telling = False
        size, layers = (self.width, self.width), setup.architecture.layers
        self.blocks = [torch.full(size, 2.0**-14, dtype=setup.dtype, device=setup.device) for _ in range(layers)]

    def logits(self, token: Tensor, position: Any) -> Tensor:
        x = torch.ones((self.width, 1), dtype=self.setup.dtype, device=token.device)
        for block in self.blocks:
            x = block @ x
        return super().logits(token, position) * x[0, 0]


@pytest.fixture(params=["eager", "cuda_graph"])
def on_cuda(request: pytest.FixtureRequest, small: Architecture, tmp_path: Path) -> tuple[Any, dict[str, Any]]:
    backend = Chain(setup(replace(small, layers=8), "cuda", "static"))
    measured = run(backend, 10, request.param, tmp_path / "trace.json.gz")
    assert annotated(unzipped(tmp_path / "trace.json.gz")).count(STEP) == TRACED_STEPS
    return request.param, measured


@pytest.mark.gpu
def test_on_cuda_the_device_is_busy_within_its_span(on_cuda: tuple[str, dict[str, Any]]) -> None:
    execution, measured = on_cuda
    found = measured["profile"]
    assert found["steps"] == 10
    assert 0 < found["busy_us"] <= found["span_us"] <= found["wall_us"]
    assert found["kernel_us"] <= found["busy_us"] * 1.01, "one stream: nothing overlaps"
    assert found["kernels_per_step"] >= 8
    assert found["kernels_per_block"] >= 1
    dearest = next(iter(found["kernels"].values()))
    assert dearest["count"] == 8
    assert dearest["us"] > found["busy_us"] / 2
    launches = found["calls"].get("cudaGraphLaunch", {"count": 0})["count"]
    assert launches == (1 if execution == "cuda_graph" else 0)
    assert 0 < found["launch_us"] <= found["runtime_us"]
    assert found["host_us"] < found["wall_us"]
    assert found["cpu_cuda_ratio"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("on_cuda", ["cuda_graph"], indirect=True)
def test_on_cuda_a_graphed_step_s_parts_are_the_unprofiled_step(on_cuda: tuple[str, dict[str, Any]]) -> None:
    found, step_ms = on_cuda[1]["profile"], statistics.median(on_cuda[1]["step_times_ms"])
    assert (found["busy_us"] + found["gap_us"]) / 1e3 == pytest.approx(step_ms, rel=0.05)
    assert doubts(found, step_ms) == []
    split = figures(found, step_ms)
    assert split["gpu_busy_ms"] + split["launch_gap_ms"] == pytest.approx(step_ms)
