"""The cell record on disk, and the figures that stand in it, from a made-up measurement with hand-computed ones."""

import dataclasses
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry import metrics, shown
from registry import record as records
from registry.compose import Composer
from registry.hardware import Device
from registry.outcome import Outcome
from registry.plan import Cell
from registry.record import BadRecord, Record

STUDY_KEYS = {
    "arch": "tiny",
    "gpu": "l4",
    "ctx": 100,
    "p50_ms": 2.0,
    "weight_bytes": 353_088.0,
    "bytes_per_token_kv": 768,
    "avg_ctx_during_measure": 104.0,
    "kv_bytes_avg": 319_488.0,
    "bw_peak_gbs": 0.5,
    "t_floor_ms": 1.345152,
    "R_floor": 0.672576,
    "n_layers": 3,
    "source": "rfloor",
}
"""The study's keys as the design names them, for `made_up_cell` and `made_up_answer`, by hand:

A block of `tiny` has 128 x (128 + 2 x 64) + 128 x 128 weights in its attention, 256 biases, 3 x 128 x 256 in
its feed-forward, 2 x 128 in its norms: 147968. Three of them, two embeddings of 1024 x 128 and a norm are
706176 parameters, half a byte each. A cached token has 2 x 3 layers x 2 heads x 32 x 2 bytes. Steps 3 to 5
after a prefill of 100 attend to 103, 104, 105 tokens, four streams to 104 each on average.
"""


def made_up_cell(composer: Composer, *overrides: str, gpu: str = "gpu.peak_bandwidth_gbs=0.5") -> Cell:
    """A planned cell, by default on half a GB/s at $3.60 an hour."""
    config = composer.cell(
        [
            *("model=tiny", "gpu=l4", "quant=nf4", "backend=hf", "context=100"),
            *("protocol.batch_size=4", "protocol.warmup_steps=2", "protocol.measured_steps=3"),
            *("gpu.price_usd_per_hour=3.6", gpu),
            *overrides,
        ]
    )
    device = Device("cuda", "NVIDIA L4", 24 << 30, "GPU-0", (8, 9), "570.86.15")
    return Cell(config, device, cell_id="0123456789abcdef", versions={"torch": "2.13.0"})


def made_up_answer(**changes: Any) -> dict[str, Any]:
    """What a worker would have answered."""
    return {
        "step_times_ms": [1.9, 2.0, 2.1],
        "revisit_times_ms": [1.8, 1.9, 2.0],
        "event_times_ms": [1.5, 1.7, 1.6],
        "ttft_ms": 12.5,
        "read_bandwidth_gbs": 0.4,
        "streamed_weight_bytes": 500_000,
        "streamed_kv_bytes": 100_000,
        "peak_memory_bytes": 2_500_000_000,
        "decode_peak_memory_bytes": 1_250_000_000,
        "fidelity": {"logit_cosine": 0.9995, "top1_agreement": 0.96875},
        "execution": {},
        "kernels": {"void marlin::Marlin<__nv_bfloat16>(int4 const*)": 196},
        "device_before": {"sm_clock_mhz": 2000, "sm_clock_max_mhz": 2040, "throttled": []},
        "device_after": {"sm_clock_mhz": 2000, "sm_clock_max_mhz": 2040, "throttled": []},
    } | changes


def made_up_record(cell: Cell | None = None, **changes: Any) -> Record:
    """A record; with a cell one of an ok measurement, without one of a refusal."""
    record = Record(
        record_id="00c0ffee",
        cell_id="0123456789abcdef",
        sweep_id="20260701-101010-abcd",
        index=7,
        outcome=Outcome.UNSUPPORTED,
        label="tiny l4 hf nf4 sdpa eager ctx=100",
        started_at="2026-07-01T10:10:10.250+00:00",
        wall_s=31.5,
        config={"model": {"name": "tiny", "rope_scaling": None}, "quant": {"name": "nf4", "plugin": "nf4"}},
        environment={
            "device": {"name": "NVIDIA L4", "driver": "570.86.15"},
            "versions": {"torch": "2.13.0"},
            "git": {"commit": "c0ffee", "dirty": "false"},
        },
        reason="no such kernel",
        remedy="use another",
    )
    if cell:
        answer = made_up_answer()
        record.outcome, record.reason, record.remedy = Outcome.OK, "", ""
        record.config = dataclasses.asdict(cell.config)
        record.metrics = metrics.metrics(cell, answer)
        record.study = metrics.study_keys(cell, 0.5, 2.0)
        record.step_times_ms, record.event_times_ms = answer["step_times_ms"], answer["event_times_ms"]
    return dataclasses.replace(record, **changes)


@pytest.fixture
def cell(composer: Composer) -> Cell:
    return made_up_cell(composer)


# The file


@pytest.mark.parametrize("outcome", Outcome)
def test_what_is_written_is_read_back(tmp_path: Path, cell: Cell, outcome: Outcome) -> None:
    record = made_up_record(
        cell, outcome=outcome, warnings=["unsteady"], event_times_ms=None, measured={"threads": 2, "é": [None]}
    )
    file = records.write(record, tmp_path / "new" / "folder")
    assert file == tmp_path / "new" / "folder" / "0123456789abcdef" / "20260701-101010-abcd-7.json"
    assert records.read(file) == record
    assert json.loads(file.read_text()) == json.loads(json.dumps(record.plain()))


def test_a_record_replaces_an_older_one_of_its_session(tmp_path: Path) -> None:
    file = records.write(made_up_record(reason="old"), tmp_path)
    assert records.write(made_up_record(reason="new"), tmp_path) == file
    assert records.read(file).reason == "new"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    "content", [{"a": 1, "b": object()}, {"a": float("nan")}, {"a": float("inf")}, {"a": {1j: 0}}]
)
@pytest.mark.parametrize("old", [None, '{"old": true}\n'])
def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, content: dict[str, Any], old: str | None
) -> None:
    file = tmp_path / "record.json"
    if old:
        file.write_text(old)
    with pytest.raises((TypeError, ValueError)):
        records.write_json(file, content)
    assert {left.name: left.read_text() for left in tmp_path.iterdir()} == ({"record.json": old} if old else {})


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupt_while_writing_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    file = tmp_path / "record.json"
    file.write_text("old")

    def interrupted(*_: object) -> None:
        assert len(list(tmp_path.iterdir())) == 2, "nothing is written beside the old file"
        raise KeyboardInterrupt

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), interrupted)
    with pytest.raises(KeyboardInterrupt):
        records.write_json(file, {"new": True})
    assert {left.name: left.read_text() for left in tmp_path.iterdir()} == {"record.json": "old"}


def test_a_record_is_as_readable_as_any_other_file(tmp_path: Path) -> None:
    """Whoever serves or imports the records need not be the user who measured."""
    (tmp_path / "any").touch()
    mode = stat.S_IMODE(records.write(made_up_record(), tmp_path).stat().st_mode)
    assert mode == stat.S_IMODE((tmp_path / "any").stat().st_mode)


# Damage


def refusal(tmp_path: Path, content: str | bytes) -> str:
    file = tmp_path / "damaged.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadRecord) as caught:
        records.read(file)
    told = str(caught.value)
    assert told.startswith(f"{file}: ")
    return told.removeprefix(f"{file}: ")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[]", "no JSON object"),
        ("null", "no JSON object"),
        ("{} {}", "Extra data"),
        (b"\xff\xfe{}", "can't decode byte"),
        ('\ufeff{"schema_version": 1}', "BOM"),
        ("[" * 100_000, "nested too deeply"),
        ('{"schema_version": NaN}', "NaN is no JSON"),
        ('{"schema_version": -Infinity}', "-Infinity is no JSON"),
        ("{}", "schema version None, this rfloor reads 1"),
        ("1" * 5000, "integer string conversion"),
    ],
    ids=range(12),
)
def test_what_is_no_record_is_refused_with_file_and_cause(tmp_path: Path, content: str | bytes, cause: str) -> None:
    assert cause in refusal(tmp_path, content)


def test_a_file_that_is_not_there_or_no_file_is_refused(tmp_path: Path) -> None:
    for file in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(BadRecord, match=str(file)):
            records.read(file)


@pytest.mark.parametrize("version", [None, 0, 2, "1", 1.0, True, [1]])
def test_another_schema_version_is_refused(tmp_path: Path, version: object) -> None:
    told = refusal(tmp_path, json.dumps(made_up_record().plain() | {"schema_version": version}))
    assert told == f"schema version {version!r}, this rfloor reads 1"


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "outcome": ({"outcome": "fine"}, "an outcome is one of ok, oom, unsupported"),
    "no_steps": ({"step_times_ms": []}, "the outcome is ok and there are no step_times_ms"),
    "step_text": ({"step_times_ms": [1, "2"]}, "a time or a metric is no finite number"),
    "step_bool": ({"step_times_ms": [1, True]}, "a time or a metric is no finite number"),
    "step_huge": ({"step_times_ms": [1, 10**400]}, "a time or a metric is no finite number"),
    "event_null": ({"event_times_ms": [None]}, "a time or a metric is no finite number"),
    "metric_null": ({"metrics": {"mbu": None}}, "a time or a metric is no finite number"),
    "wall_bool": ({"wall_s": True}, "wall_s is a bool"),
    "index_bool": ({"index": False}, "index is a bool"),
    "index_float": ({"index": 1.0}, "index is a float"),
    "started": ({"started_at": "yesterday"}, "started_at is no ISO 8601 time with a zone: 'yesterday'"),
    "started_naive": ({"started_at": "2026-07-01T10:10:10"}, "started_at is no ISO 8601 time with a zone"),
    "warning": ({"warnings": [1]}, "a warning is no text"),
    "device": ({"environment": {"device": "L4"}}, "environment.device is a str"),
    "versions": ({"environment": {"versions": None}}, "environment.versions is a NoneType"),
    "git": ({"environment": {"git": []}}, "environment.git is a list"),
    "tags": ({"environment": {"tags": ["upstream"]}}, "environment.tags is a list"),
    "kind": ({"kind": "prefill"}, "a record's kind is one of step, attention, not 'prefill'"),
    "no_calls": ({"kind": "attention"}, "the outcome is ok and there are no call_times_us"),
    "call_time": ({"call_times_us": ["8.4"]}, "a time or a metric is no finite number"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_value_that_no_record_has_is_refused(tmp_path: Path, cell: Cell, name: str) -> None:
    changes, cause = CHANGES[name]
    assert cause in refusal(tmp_path, json.dumps(made_up_record(cell).plain() | changes))


def test_an_infinite_metric_is_refused(tmp_path: Path, cell: Cell) -> None:
    text = json.dumps(made_up_record(cell).plain()).replace('"ttft_ms": 12.5', '"ttft_ms": 1e999')
    assert refusal(tmp_path, text) == "1e999 is no finite number"


@pytest.mark.parametrize("key", [f.name for f in dataclasses.fields(Record) if f.name != "study"])
def test_every_field_has_to_be_there_and_of_its_type(tmp_path: Path, key: str) -> None:
    plain = made_up_record().plain()
    without = {k: v for k, v in plain.items() if k != key}
    if key in records.LATER:  # there are records from before it
        [default] = [field for field in dataclasses.fields(Record) if field.name == key]
        empty = default.default_factory() if callable(default.default_factory) else default.default
        assert getattr(records.from_plain(without), key) == empty
    else:
        assert refusal(tmp_path, json.dumps(without)) == f"no {key}"
    wrong = 1 if isinstance(plain[key], str) else "text"
    assert refusal(tmp_path, json.dumps(plain | {key: wrong})) == f"{key} is a {type(wrong).__name__}"


def test_fields_of_a_later_minor_version_are_passed_over() -> None:
    record = made_up_record()
    assert records.from_plain(record.plain() | {"a_key_of_tomorrow": 1}) == record


def take(file: Path, content: bytes) -> None:
    """Read a file that may be damaged; what is read as a record can be logged as one."""
    file.write_bytes(content)
    told = ""
    try:
        record = records.read(file)
    except BadRecord as error:
        told = str(error)
    if told:
        assert told.startswith(f"{file}: ")
        return
    assert records.from_plain(json.loads(json.dumps(record.plain()))) == record
    assert all(isinstance(value, str) for value in shown.tags(record).values())
    assert all(isinstance(value, str) for _, value in shown.flatten(record.config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@given(data=st.data())
def test_damaged_bytes_are_a_bad_record_and_nothing_else(
    folder: Path, composer: Composer, data: st.DataObject
) -> None:
    content = json.dumps(made_up_record(made_up_cell(composer)).plain()).encode()
    start = data.draw(st.integers(0, len(content)))
    length = data.draw(st.integers(0, 40) | st.just(len(content)))
    patch = data.draw(
        st.binary(max_size=20) | st.sampled_from([b"", b"1", b"null", b'"', b"}", b"1e999", b"\\ud800"])
    )
    take(folder / "bytes.json", content[:start] + patch + content[start + length :])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
def test_dropped_and_retyped_keys_are_a_bad_record_and_nothing_else(
    folder: Path, composer: Composer, data: st.DataObject
) -> None:
    plain = made_up_record(made_up_cell(composer)).plain()
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = plain
        while True:
            key = data.draw(st.sampled_from(sorted(place)))
            if not (isinstance(place[key], dict) and place[key] and data.draw(st.booleans())):
                break
            place = place[key]
        if data.draw(st.booleans()):
            place[key] = data.draw(JSON)
        elif len(place) > 1:
            del place[key]
    take(folder / "keys.json", json.dumps(plain).encode())


# The figures


def test_the_study_s_keys_stand_at_the_top_level(tmp_path: Path, cell: Cell) -> None:
    record = made_up_record(cell)
    plain = json.loads(records.write(record, tmp_path).read_text())
    assert {key: plain[key] for key in STUDY_KEYS} == pytest.approx(STUDY_KEYS)
    assert tuple(STUDY_KEYS) == records.STUDY_KEYS
    assert not set(STUDY_KEYS) & {f.name for f in dataclasses.fields(Record)}, "a key of ours hides one of the study"


FIGURES = {
    "median_tpot_ms": 2.0,
    "mean_tpot_ms": 2.0,
    "p90_tpot_ms": 2.08,
    "p99_tpot_ms": 2.098,
    "std_tpot_ms": 0.1,
    "revisit_median_tpot_ms": 1.9,
    "event_median_tpot_ms": 1.6,
    "ttft_ms": 12.5,
    "tokens_per_s": 4 / 0.002,
    "r_floor": 0.672576,  # 353088 + 319488 bytes at 0.5 GB/s, over 2 ms
    "floor_ms": 1.345152,
    "mbu": 0.6,  # 600000 bytes at 0.5 GB/s, over 2 ms
    "mbu_attainable": 0.75,  # the same at 0.4 GB/s
    "weight_bytes": 353_088,
    "kv_bytes": 319_488,
    "streamed_bytes": 600_000,
    "peak_memory_gb": 2.5,
    "decode_peak_memory_gb": 1.25,
    "read_bandwidth_gbs": 0.4,
    "usd_per_mtok": 0.5,  # a million tokens are 250000 steps of 2 ms: 500 s of $3.60 an hour
    "logit_cosine": 0.9995,
    "top1_agreement": 0.96875,
}


def test_every_figure_of_a_measured_cell(cell: Cell) -> None:
    assert metrics.metrics(cell, made_up_answer()) == pytest.approx(FIGURES)


PROFILE = {
    "steps": 10,
    "wall_us": 4000.0,
    "inflation": 2.0,
    "busy_us": 1500.0,
    "gap_us": 2000.0,
    "head_us": 400.0,
    "tail_us": 100.0,
    "host_us": 3500.0,
    "kernels_per_step": 33,
    "kernels_per_block": 10,
    "cpu_cuda_ratio": 0.75,
}


def test_a_profile_adds_its_figures_and_changes_no_other(cell: Cell) -> None:
    added = {
        "gpu_busy_ms": 1.5,
        "memcpy_ms": 0.0,
        "launch_gap_ms": 0.5,  # of the 2 ms of an unprofiled step
        "profiled_step_ms": 4.0,
        "host_ms": 3.5,
        "kernels_per_step": 33,
        "kernels_per_block": 10,
        "profiler_inflation": 2.0,
        "cpu_cuda_ratio": 0.75,
        "bw_util": 0.672576,  # the study's bytes, as in r_floor
        "bw_util_profiled": 0.336288,  # over 4 ms
    }
    assert metrics.metrics(cell, made_up_answer(profile=PROFILE)) == pytest.approx(FIGURES | added)


def test_without_a_profiled_step_the_unprofiled_one_has_its_utilisation(cell: Cell) -> None:
    figures = metrics.metrics(cell, made_up_answer(profile={"steps": 0}))
    assert figures == pytest.approx(FIGURES | {"bw_util": 0.672576})


@pytest.mark.parametrize(
    ("overrides", "changes", "missing"),
    [
        (["gpu.price_usd_per_hour=null"], {}, "usd_per_mtok"),
        ([], {"event_times_ms": None}, "event_median_tpot_ms"),
    ],
)
def test_what_does_not_exist_is_left_out(
    composer: Composer, overrides: list[str], changes: dict[str, Any], missing: str
) -> None:
    figures = metrics.metrics(made_up_cell(composer, *overrides), made_up_answer(**changes))
    assert figures == pytest.approx({name: value for name, value in FIGURES.items() if name != missing})


def test_without_a_spec_sheet_the_measured_bandwidth_stands_in(composer: Composer) -> None:
    cell = made_up_cell(composer, "gpu=cpu", "gpu.price_usd_per_hour=null", gpu="gpu.memory_gb=8")
    figures = metrics.metrics(cell, made_up_answer(event_times_ms=None))
    assert figures["mbu"] == figures["mbu_attainable"] == pytest.approx(0.75)
    assert figures["floor_ms"] == pytest.approx(1.68144)
    assert metrics.study_keys(cell, 0.4, 2.0)["bw_peak_gbs"] == 0.4


# The warnings


def warnings(cell: Cell, **changes: Any) -> list[str]:
    answer = made_up_answer(**changes)
    return metrics.warnings(cell, answer, metrics.metrics(cell, answer))


def test_a_steady_cell_has_no_warnings(cell: Cell) -> None:
    assert warnings(cell) == []


def test_unsteady_steps_are_told(cell: Cell) -> None:
    assert warnings(cell, step_times_ms=[1.8, 2.0, 2.2]) == [
        "unsteady: the standard deviation is 10% of the mean step time"
    ]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"throttled": []}, ""),
        ({}, ""),
        ({"throttled": ["software power cap"], "sm_clock_mhz": 1960, "sm_clock_max_mhz": 2000}, ""),
        (
            {"throttled": ["software power cap"], "sm_clock_mhz": 1959, "sm_clock_max_mhz": 2000},
            "software power cap: SM clock 1959 of 2000 MHz",
        ),
        ({"throttled": ["hardware slowdown", "power brake"]}, "hardware slowdown and power brake"),
    ],
)
def test_throttling_is_told_with_its_clocks_once_it_costs_two_percent(
    cell: Cell, moment: str, state: dict[str, Any], told: str
) -> None:
    expected = [f"throttled {moment} the window by {told}"] if told else []
    assert warnings(cell, **{f"device_{moment}": state}) == expected


ONE = {"pid": 7, "memory_bytes": 3_000_000_000}
SHARED = [
    ({}, None, []),
    ({"processes": [], "memory_used_bytes": 700_000_000, "utilisation_percent": 2}, 1, []),
    (
        {
            "processes": [ONE, {"pid": 8, "memory_bytes": None}],
            "memory_used_bytes": 4 << 30,
            "utilisation_percent": 0,
        },
        3,
        ["shared: 2 other processes held 3.0 GB of the device before the worker came"],
    ),
    (
        {"memory_used_bytes": 2_500_000_000},
        None,
        ["shared: 2.5 GB of the device were in use before the worker came"],
    ),
    ({"processes": [], "utilisation_percent": 93}, 1, ["shared: the device was busy 93 % of the time before"]),
    ({"processes": []}, 3, ["shared: 2 other processes came to the device while the worker was there"]),
]


@pytest.mark.parametrize(("before", "after", "told"), SHARED)
def test_a_run_beside_others_carries_a_warning(
    cell: Cell, before: dict[str, Any], after: int | None, told: list[str]
) -> None:
    found = warnings(cell, load_before=before, contexts_after=after)
    assert [warning[: len(words)] for warning, words in zip(found, told, strict=True)] == told


TWO = {"pid": 8, "memory_bytes": 1_000_000_000}


@pytest.mark.parametrize(
    ("before", "window", "after", "told"),
    [
        ({"processes": []}, {"processes": [ONE]}, 1, []),
        (
            {"processes": []},
            {"processes": [ONE, TWO]},
            1,
            ["shared: 1 other processes came to the device before the"],
        ),
        (
            {"processes": []},
            {"processes": [ONE, TWO]},
            2,
            ["shared: 1 other processes came to the device before the"],
        ),
        ({"processes": [TWO]}, {"processes": [ONE, TWO]}, 2, ["shared: 1 other processes held 1.0 GB"]),
        (
            {"processes": [TWO]},
            {"processes": [ONE, TWO, TWO]},
            3,
            ["shared: 1 other processes held 1.0 GB", "shared: 1 other processes came to the device before the"],
        ),
        ({"memory_used_bytes": 10**9}, {"memory_used_bytes": 12 * 10**9, "own_bytes": 9 * 10**9}, None, []),
        (
            {"memory_used_bytes": 10**9},
            {"memory_used_bytes": 16 * 10**9, "own_bytes": 9 * 10**9},
            None,
            ["shared: others with 5.0 GB or more came to the device before the"],
        ),
        ({}, {"memory_used_bytes": 16 * 10**9, "own_bytes": 0}, None, []),
    ],
)
def test_who_came_while_the_worker_built_checked_and_loaded_is_told(
    cell: Cell, before: dict[str, Any], window: dict[str, Any], after: int | None, told: list[str]
) -> None:
    found = warnings(cell, load_before=before, load_window=window, contexts_after=after)
    assert [warning[: len(words)] for warning, words in zip(found, told, strict=True)] == told


@pytest.mark.parametrize(
    ("changes", "name", "value"),
    [
        ({"step_times_ms": [1.25, 1.25], "revisit_times_ms": [1.25]}, "r_floor", 1.0761216),
        ({"streamed_weight_bytes": 1_900_000, "read_bandwidth_gbs": 1.0}, "mbu", 2.0),
        ({"streamed_weight_bytes": 790_000}, "mbu_attainable", 1.1125),
    ],
)
def test_a_figure_above_1_is_kept_and_flagged(cell: Cell, changes: dict[str, Any], name: str, value: float) -> None:
    assert metrics.metrics(cell, made_up_answer(**changes))[name] == pytest.approx(value)
    told = [warning for warning in warnings(cell, **changes) if warning.startswith(f"{name} is")]
    assert told == [
        f"{name} is {value:.3f}: above 1, so a cache held part of the bytes or the bandwidth is another's"
    ]


def test_a_figure_of_exactly_1_is_not_flagged(cell: Cell) -> None:
    changes = {"streamed_weight_bytes": 700_000}  # 800000 bytes at 0.4 GB/s take the very 2 ms
    assert metrics.metrics(cell, made_up_answer(**changes))["mbu_attainable"] == 1.0
    assert warnings(cell, **changes) == []


@pytest.mark.parametrize(("again", "told"), [(2.0, False), (1.99, True), (3.0, False)])
def test_a_first_visit_that_is_15_percent_dearer_is_told(cell: Cell, again: float, told: bool) -> None:
    found = warnings(cell, step_times_ms=[2.3], revisit_times_ms=[again])
    assert [
        w.startswith(f"first visit: a step took 2.30 ms, over the same positions again {again}") for w in found
    ] == ([True] if told else [])


COMPILED = {
    "compile_s": 61.5,
    "mode": "reduce-overhead",
    "compiled_graphs": 3,
    "graph_breaks": 0,
    "graph_break_reasons": [],
    "recompilations": 0,
    "cudagraph_skips": 0,
    "rerecorded": False,
}
"""What the record says of a step of which torch.compile made what it was asked for."""


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        (
            {"recompilations": 2},
            ["recompilations while steps were timed: 2; those steps hold the compiler's time"],
        ),
        (
            {"rerecorded": True},
            ["CUDA graphs were recorded while steps were timed; those steps hold the recording's time"],
        ),
        (
            {"graph_breaks": 4, "graph_break_reasons": ["Unsupported a", "Unsupported b"]},
            ["graph breaks: 4; Python runs between the 3 graphs compiled of a step (Unsupported a; Unsupported b)"],
        ),
        (
            {"cudagraph_skips": 1},
            ["CUDA graphs skipped: 1; mode reduce-overhead promises them, and Python launched what it skipped"],
        ),
    ],
)
def test_what_a_compiled_step_did_otherwise_is_told(cell: Cell, changes: dict[str, Any], told: list[str]) -> None:
    assert warnings(cell, execution=COMPILED | changes) == told


def test_seconds_of_compiling_are_a_figure_where_there_are_some(cell: Cell) -> None:
    assert metrics.metrics(cell, made_up_answer(execution=COMPILED))["compile_s"] == 61.5
    assert "compile_s" not in metrics.metrics(cell, made_up_answer())


@pytest.mark.parametrize(("gpu", "told"), [("gpu.memory_gb=8", 1), ("gpu.peak_bandwidth_gbs=0.5", 0)])
def test_a_floor_without_a_spec_sheet_says_so(composer: Composer, gpu: str, told: int) -> None:
    found = warnings(made_up_cell(composer, "gpu=cpu", gpu=gpu))
    assert found == ["no spec sheet: r_floor and mbu stand against the measured read bandwidth"] * told


@pytest.mark.parametrize(
    ("profile", "told"),
    [
        (
            PROFILE,
            "profiled steps took 2.00 times as long as unprofiled ones: the gap between kernels is the profiler's",
        ),
        ({"steps": 0}, "torch.profiler saw no step here"),
    ],
)
def test_a_profile_that_is_not_the_unprofiled_step_s_is_told(cell: Cell, profile: dict[str, Any], told: str) -> None:
    [warning] = warnings(cell, profile=profile)
    assert warning.startswith(told)


def test_a_few_slow_steps_are_no_first_visit(cell: Cell) -> None:
    found = warnings(cell, step_times_ms=[2.0, 4.0, 4.0, 4.0], revisit_times_ms=[2.0])
    assert not any(w.startswith("first visit") for w in found)
