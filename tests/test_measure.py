"""The protocol, the ways to launch a step, and the fidelity check, on backends small enough to follow."""

import gc
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from backends.attention.sdpa import Sdpa, SdpaOptions
from backends.hf import HfBackend
from backends.quant.none import NoQuant
from registry import measure as measuring
from registry.api import Architecture, Backend, NoOptions, Setup, StepBytes
from registry.capture import capture
from registry.compiling import Compilations
from registry.display import LONG
from registry.execution import EXECUTIONS, Compiled, Execution
from registry.fidelity import LAYERS, MIN_COSINE, PREFIX, STEPS, Fidelity, compare
from registry.measure import PROBE_BYTES, PROBE_REPEATS, measure, quiet, read_bandwidth
from registry.metrics import compiling
from registry.outcome import Outcome, Refusal, Refused
from registry.proof import MIN_CORRELATION, PROOF_STEPS, prove
from registry.schema import COMPILE_MODES, ExecutionConfig, ProtocolConfig
from registry.weights import RandomWeights

VOCAB = 97
CONTEXT, WARMUP, MEASURED, BATCH = 11, 2, 5, 2
STEPS_A_PASS = WARMUP + MEASURED
KERNEL_STEPS = 1
"""Steps after everything that is timed, for the profiler to see their kernels."""
PROTOCOL = ProtocolConfig("test", CONTEXT, BATCH, WARMUP, MEASURED, seed=3, timeout_s=60)


def setup(architecture: Architecture, device: str = "cpu", cache: str = "dynamic") -> Setup:
    return Setup(
        architecture=architecture,
        weights=RandomWeights(0),
        device=device,
        dtype=torch.bfloat16,
        batch_size=BATCH,
        cache=cache,
        linear=NoQuant(NoOptions()),
        attention=Sdpa(SdpaOptions()),
        options=NoOptions(),
    )


class Counter(Backend):
    """Its next token is its last one times three plus its position; it tells all that is asked of it.

    The position lives on the device, as a captured step needs it; telling reads it, which one must not do.
    """

    telling = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.asked: list[Any] = []
        self.collecting: list[bool] = []
        self.end = torch.zeros((), dtype=torch.int64, device=setup.device)
        self.vocabulary = torch.arange(VOCAB, device=setup.device)

    def logits(self, token: Tensor, position: Any) -> Tensor:
        following = (token * 3 + position) % VOCAB
        return (self.vocabulary == following[:, None]).float()

    def load(self, capacity: int) -> None:
        raise AssertionError("the caller loads")

    def prefill(self, input_ids: Tensor) -> Tensor:
        self.asked.append(("prefill", input_ids))
        self.end.fill_(input_ids.shape[1])
        return self.logits(input_ids[:, -1], self.end)

    def decode_step(self, token: Tensor) -> Tensor:
        if self.telling and self.setup.device == "cpu":
            self.asked.append(("step", token.tolist(), int(self.end)))
        self.collecting.append(gc.isenabled())
        logits = self.logits(token, self.end)
        self.end.add_(1)
        return logits

    def seek(self, position: int) -> None:
        self.asked.append(("seek", position))
        self.end.fill_(position)

    def position(self) -> int:
        return int(self.end)

    def bytes_per_step(self, context: float) -> StepBytes:
        return StepBytes(1000, 10 * context)

    weights = dequantized = close = None  # type: ignore[assignment] - a measurement asks for none


@pytest.fixture(scope="session")
def small(architecture: Architecture) -> Architecture:
    return replace(architecture, vocab=VOCAB)


@pytest.fixture
def counter(small: Architecture) -> Counter:
    return Counter(setup(small))


def run(backend: Counter, protocol: ProtocolConfig = PROTOCOL, execution: str = "eager") -> dict[str, Any]:
    launched = ExecutionConfig(
        execution, execution, backend.setup.cache, "default" if execution == "compile" else None
    )
    return measure(backend, launched, protocol, 20.5, lambda name: backend.asked.append(("stage", name)))


def following(first: list[int], steps: int) -> list[list[int]]:
    """The tokens that the rule gives, from the one that the prefill chose."""
    tokens = [first]
    for position in range(CONTEXT, CONTEXT + steps):
        tokens.append([(token * 3 + position) % VOCAB for token in tokens[-1]])
    return tokens


# The protocol


def test_the_protocol_asks_for_what_it_says_in_its_order(counter: Counter) -> None:
    measured = run(counter)
    first, prompt = counter.asked[1]
    assert first == "prefill"
    assert prompt.shape == (BATCH, CONTEXT)
    chosen = ((prompt[:, -1] * 3 + CONTEXT) % VOCAB).tolist()
    tokens = following(chosen, STEPS_A_PASS)
    steps = [("step", token, CONTEXT + place) for place, token in enumerate(tokens[:-1])]
    assert [(what, *rest) for what, *rest in counter.asked if what != "prefill"] == [
        ("stage", "prefill"),
        ("stage", "prepare eager"),
        ("stage", "measure"),
        *steps,
        ("seek", CONTEXT),
        *steps,
        ("seek", CONTEXT),
        ("stage", "kernels"),
        ("seek", CONTEXT),
        steps[0],
    ]
    assert measured["passes_agree"] is True
    assert measured["final_position"] == CONTEXT


def test_a_measurement_holds_a_time_for_each_measured_step(counter: Counter) -> None:
    measured = run(counter)
    assert len(measured["step_times_ms"]) == len(measured["revisit_times_ms"]) == MEASURED
    assert measured["event_times_ms"] is None
    assert (measured["streamed_weight_bytes"], measured["streamed_kv_bytes"]) == (1000, 205)


def test_no_warm_up_is_a_protocol_too(counter: Counter) -> None:
    measured = run(counter, replace(PROTOCOL, warmup_steps=0, measured_steps=1))
    assert len(measured["step_times_ms"]) == 1
    assert [what for what, *_ in counter.asked].count("step") == 2 + KERNEL_STEPS


def test_the_prompt_is_the_seed_s(small: Architecture) -> None:
    def prompt(seed: int) -> Tensor:
        backend = Counter(setup(small))
        run(backend, replace(PROTOCOL, seed=seed))
        [prompt] = [rest[0] for what, *rest in backend.asked if what == "prefill"]
        return prompt

    assert torch.equal(prompt(3), prompt(3))
    assert not torch.equal(prompt(3), prompt(4))
    assert 0 <= int(prompt(3).min()) <= int(prompt(3).max()) < VOCAB


class Slow(Counter):
    """Takes as long as it says, in milliseconds."""

    prefill_ms = 30.0
    first_visit_ms = 12.0
    step_ms = 3.0

    def prefill(self, input_ids: Tensor) -> Tensor:
        time.sleep(self.prefill_ms / 1e3)
        self.met: set[int] = set()
        return super().prefill(input_ids)

    def decode_step(self, token: Tensor) -> Tensor:
        time.sleep((self.step_ms if self.position() in self.met else self.first_visit_ms) / 1e3)
        self.met.add(self.position())
        return super().decode_step(token)


def test_times_are_the_steps_own(small: Architecture) -> None:
    """A time is at least what its step slept; how much more is the machine's, so the least of them is judged."""
    measured = run(Slow(setup(small)))
    assert 30 <= measured["ttft_ms"] < 3000
    assert 12 <= min(measured["step_times_ms"]) < 60
    assert 3 <= min(measured["revisit_times_ms"]) < 12


class Forgetful(Counter):
    """Chooses other tokens when it comes to the same positions again."""

    def decode_step(self, token: Tensor) -> Tensor:
        visits = [what for what, *_ in self.asked].count("seek")
        return super().decode_step(token).roll(visits, -1)


def test_passes_that_disagree_are_told(small: Architecture) -> None:
    assert run(Forgetful(setup(small)))["passes_agree"] is False


# Quiet


def test_the_garbage_collector_rests_while_steps_are_timed(counter: Counter) -> None:
    assert gc.isenabled()
    run(counter)
    assert counter.collecting == [False] * 2 * STEPS_A_PASS + [True] * KERNEL_STEPS
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


class Failing(Counter):
    def decode_step(self, token: Tensor) -> Tensor:
        if self.position() == CONTEXT + 4:
            raise RuntimeError("broken on purpose")
        return super().decode_step(token)


def test_the_garbage_collector_works_again_after_an_exception(small: Architecture) -> None:
    with pytest.raises(RuntimeError, match="broken on purpose"):
        run(Failing(setup(small)))
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_what_lives_is_out_of_the_collector_s_sight() -> None:
    with quiet():
        assert gc.get_freeze_count() > 1000
        assert not gc.isenabled()


def test_who_else_is_on_the_device_is_asked_once_all_is_ready(
    small: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, met = Counter(setup(small)), []

    def beside(device: str) -> dict[str, Any]:
        met.append((device, len(counter.collecting)))
        return {"processes": []}

    monkeypatch.setattr(measuring, "load_beside", beside)
    assert run(counter)["load_window"] == {"processes": []}
    assert met == [("cpu", 0)]  # after the prefill, and no step of the window was made


def test_what_runs_beside_a_worker_is_told_without_its_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"processes": [{"pid": 1, "memory_bytes": 5}], "memory_used_bytes": 7, "utilisation_percent": 90}
    monkeypatch.setattr(measuring, "load", lambda: dict(found))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3)
    del found["utilisation_percent"]
    assert measuring.load_beside("cuda") == found | {"own_bytes": 3}
    assert measuring.load_beside("cpu") == {}


# Memory and bandwidth


class Hungry(Counter):
    """Holds 300 MB during its prefill and 100 MB in a step."""

    def prefill(self, input_ids: Tensor) -> Tensor:
        torch.ones(300_000_000, dtype=torch.uint8)
        return super().prefill(input_ids)

    def decode_step(self, token: Tensor) -> Tensor:
        torch.ones(100_000_000, dtype=torch.uint8)
        return super().decode_step(token)


def test_the_peaks_of_a_life_and_of_decoding_are_two(small: Architecture) -> None:
    memory = measuring.Memory("cpu")
    memory.mark()  # what earlier tests needed is forgotten
    before = memory.peaks()["decode_peak_memory_bytes"]
    measured = run(Hungry(setup(small)), replace(PROTOCOL, measured_steps=1))
    life, decoding = measured["peak_memory_bytes"], measured["decode_peak_memory_bytes"]
    assert 250_000_000 < life - before < 350_000_000
    assert 150_000_000 < life - decoding < 250_000_000


@pytest.mark.skipif(not Path("/sys/devices/system/cpu/cpu0/cache").exists(), reason="this host tells no cache sizes")
def test_the_probe_is_larger_than_every_cache() -> None:
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    assert sizes
    assert PROBE_BYTES["cpu"] > 2 * sum(int(size.removesuffix("K")) * 1024 for size in sizes)


def test_bandwidth_is_the_best_reduction_s_at_its_median(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([[0.4, 0.1, 0.2], [0.05, 0.3, 0.1], [1.0, 1.0, 1.0]])
    read: list[int] = []

    def times(reduce: Callable[[], Tensor], device: str) -> list[float]:
        read.append(reduce.__self__.nbytes)  # type: ignore[attr-defined]
        assert reduce().numel() == 1
        return next(seconds)

    monkeypatch.setitem(PROBE_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(measuring, "_times", times)
    assert read_bandwidth("cpu") == pytest.approx((1 << 20) / 0.1 / 1e9)
    assert read == [1 << 20] * 3


def test_the_probe_measures_a_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROBE_BYTES, "cpu", 1 << 24)
    assert 0.01 < read_bandwidth("cpu") < 100_000
    runs: list[int] = []
    assert len(measuring._times(lambda: runs.append(1), "cpu")) == PROBE_REPEATS == len(runs) - 1


# A captured step
#
# On the CPU a tape stands for a CUDA graph: it records the operations of a step with the very tensors, and a
# replay does them again in place. In both, what the host computed meanwhile is frozen, and asking the device
# for a value is an error.


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not isinstance(result, Tensor):
            raise RuntimeError("operation not permitted when stream is capturing\nand much more")
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for function, args, kwargs, result in self.operations:
            again = function(*args, **kwargs)
            if again is not result:
                result.copy_(again)


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


@pytest.fixture(params=["tape", pytest.param("cuda", marks=pytest.mark.gpu)])
def capturing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device on which steps are captured: CUDA, or the CPU with a tape."""
    if request.param == "cuda":
        return "cuda"
    fakes = {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda _: nullcontext(),
        "CUDAGraph": Tape,
        "graph": lambda tape: tape,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return "cpu"


@pytest.mark.parametrize(
    ("cause", "refused"),
    [
        (RuntimeError("operation not permitted when stream is capturing"), True),
        (torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
    ],
)
@pytest.mark.parametrize("hidden", [False, True])
def test_a_capture_that_fails_is_unsupported_and_a_fault_is_itself(
    monkeypatch: pytest.MonkeyPatch, cause: Exception, refused: bool, hidden: bool
) -> None:
    """PyTorch ends a failed capture with an error of its own, in whose context the cause stands."""

    @contextmanager
    def graph(_: object) -> Iterator[None]:
        try:
            yield
        finally:
            if hidden:
                raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")

    def launch() -> None:
        raise cause

    fakes = {"Stream": Stream, "current_stream": Stream, "stream": lambda _: nullcontext(), "CUDAGraph": object}
    for name, fake in (fakes | {"graph": graph}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    if refused:
        with pytest.raises(Refused, match="the step cannot be captured"):
            capture("the step", lambda: None, launch)
    else:
        with pytest.raises(type(cause), match=re.escape(str(cause))):
            capture("the step", lambda: None, launch)


def prefilled(kind: type[Counter], architecture: Architecture, device: str, execution: str, room: int = 20) -> Any:
    backend = kind(setup(architecture, device, "static"))
    backend.telling = False
    first = backend.prefill(torch.tensor([[5], [7]], device=device)).argmax(dim=-1)
    backend.seek(CONTEXT)
    return EXECUTIONS[execution](backend, first, CONTEXT, room)


def proof(steps: int) -> Any:
    """A capture that agrees with eager in every step."""
    return {"proof_steps": steps, "proof_agreed": steps, "proof_correlation": pytest.approx(1)}


def tokens(execution: Execution, steps: int) -> list[list[int]]:
    found = []
    for _ in range(steps):
        execution.step()
        found.append(execution.token.tolist())
    return found


def test_a_replayed_step_feeds_back_its_token_and_moves_on(small: Architecture, capturing: str) -> None:
    with torch.inference_mode():
        graph = prefilled(Counter, small, capturing, "cuda_graph")
        assert graph.prepare() == proof(PROOF_STEPS)
        calls = len(graph.backend.collecting)
        expected = following(graph.first_token.tolist(), 12)[1:]
        assert tokens(graph, 12) == expected
        assert graph.backend.position() == CONTEXT + 12
        assert graph.evidence() == {"replays": 12}
        assert len(graph.backend.collecting) == calls, "a replay calls no Python of the backend"
        graph.rewind()
        assert graph.backend.position() == CONTEXT
        assert tokens(graph, 12) == expected
        assert graph.evidence() == {"replays": 24}
        assert tokens(prefilled(Counter, small, capturing, "eager"), 12) == expected


def test_a_capture_leaves_the_position_where_the_prefill_did(small: Architecture, capturing: str) -> None:
    with torch.inference_mode():
        graph = prefilled(Counter, small, capturing, "cuda_graph", room=4)
        assert graph.prepare() == proof(4)
        assert graph.backend.position() == CONTEXT
        assert torch.equal(graph.token, graph.first_token)


class OnTheHost(Counter):
    """Keeps its position on the host, where a capture freezes it."""

    place = 0

    def decode_step(self, token: Tensor) -> Tensor:
        self.collecting.append(gc.isenabled())
        self.place += 1
        return self.logits(token, self.place)

    def seek(self, position: int) -> None:
        self.place = position


class OnTheHostUnsure(OnTheHost):
    """As its parent, but what it chooses leads by less than bf16 can tell."""

    def logits(self, token: Tensor, position: Any) -> Tensor:
        return super().logits(token, position) * 0.01 + 1


def refused(kind: type[Counter], architecture: Architecture, device: str) -> Refusal:
    """Why no graph is made of a backend's step."""
    with torch.inference_mode(), pytest.raises(Refused) as caught:
        prefilled(kind, architecture, device, "cuda_graph").prepare()
    return caught.value.refusal


def test_a_position_on_the_host_makes_a_graph_incorrect(small: Architecture, capturing: str) -> None:
    refusal = refused(OnTheHost, small, capturing)
    assert refusal.outcome is Outcome.INCORRECT
    assert "on the same token, 2 in; 0.999 is the least" in refusal.reason


def test_a_choice_within_rounding_is_settled_by_the_other_logits(small: Architecture, capturing: str) -> None:
    refusal = refused(OnTheHostUnsure, small, capturing)
    assert refusal.outcome is Outcome.INCORRECT
    assert "'s logits correlate by -0.0" in refusal.reason
    assert "on the same token, 2 in; 0.999 is the least" in refusal.reason


class FlatOnTheHost(OnTheHost):
    """As its parent, and its logits say nothing of the position."""

    def logits(self, token: Tensor, position: Any) -> Tensor:
        return torch.linspace(0, 1, VOCAB, device=self.setup.device).expand(len(token), -1)

    def position(self) -> int:
        return self.place


def test_a_position_that_replays_leave_where_it_was_makes_a_graph_incorrect(
    small: Architecture, capturing: str
) -> None:
    refusal = refused(FlatOnTheHost, small, capturing)
    assert refusal.outcome is Outcome.INCORRECT
    assert refusal.reason == (
        f"{PROOF_STEPS} steps of the replayed graph moved the position by 0: it has to live on the device"
    )


class Wavering(Counter):
    """Two tokens lead by turns, by less than bf16 can tell; the other logits are always the same."""

    calls = 0

    def logits(self, token: Tensor, position: Any) -> Tensor:
        self.calls += 1
        likely = torch.linspace(0, 1, VOCAB, device=self.setup.device)
        likely[-2:] = 1
        likely[-1 - self.calls % 2] += 2**-9
        return likely.expand(len(token), -1)


def test_a_choice_within_rounding_may_differ(small: Architecture, capturing: str) -> None:
    with torch.inference_mode():
        graph = prefilled(Wavering, small, capturing, "cuda_graph")
        found = graph.prepare()
    assert found["proof_steps"] == PROOF_STEPS > found["proof_agreed"]
    assert 0.999 < found["proof_correlation"] < 1


class NotCapturable(Counter):
    def decode_step(self, token: Tensor) -> Tensor:
        return super().decode_step(token) + float(token[0])


def test_a_step_that_asks_the_host_is_unsupported(small: Architecture, capturing: str) -> None:
    refusal = refused(NotCapturable, small, capturing)
    assert refusal.outcome is Outcome.UNSUPPORTED
    assert refusal.reason.startswith("the step cannot be captured: ")
    assert "\n" not in refusal.reason
    assert refusal.remedy == "Use execution=eager"
    assert int(torch.ones(3, device=capturing).sum()) == 3, "the device still works"


@pytest.mark.gpu
@pytest.mark.parametrize("execution", ["eager", "cuda_graph"])
def test_a_measurement_on_cuda_times_a_third_pass_by_events(small: Architecture, execution: str) -> None:
    backend = Counter(setup(small, "cuda", "static"))
    with torch.inference_mode():
        measured = run(backend, execution=execution)
    assert len(measured["event_times_ms"]) == MEASURED
    assert all(0 < t < 1000 for t in measured["event_times_ms"])
    assert measured["final_position"] == CONTEXT + STEPS_A_PASS, "the third pass is the last to move it"
    assert measured["passes_agree"] is True
    graphed = proof(STEPS_A_PASS) | {"replays": 3 * STEPS_A_PASS}
    assert measured["execution"] == (graphed if execution == "cuda_graph" else {})
    assert 0 < measured["decode_peak_memory_bytes"] <= measured["peak_memory_bytes"]


# A compiled step
#
# Most of these compile by Dynamo alone, whose graphs PyTorch then runs as they are: Inductor takes seconds.


def compiled(kind: type[Counter], architecture: Architecture, mode: str = "default", room: int = 20) -> Compiled:
    """Prefilled, and not yet compiled."""
    backend = kind(setup(architecture, cache="static"))
    first = backend.prefill(torch.tensor([[5], [7]])).argmax(dim=-1)
    backend.seek(CONTEXT)
    return Compiled(backend, first, CONTEXT, room, mode)


@pytest.fixture
def dynamo(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without Inductor."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


class Traceable(Counter):
    """As its parent, without what Dynamo cannot follow."""

    def decode_step(self, token: Tensor) -> Tensor:
        logits = self.logits(token, self.end)
        self.end.add_(1)
        return logits


def test_a_compiled_step_feeds_back_its_token_and_moves_on(small: Architecture, dynamo: None) -> None:
    with torch.inference_mode():
        step = compiled(Traceable, small)
        prepared = step.prepare()
        assert prepared.pop("compile_s") > 0
        assert prepared == proof(PROOF_STEPS) | {"graphs_from_cache": 0}
        assert step.backend.position() == CONTEXT
        expected = following(step.first_token.tolist(), 12)[1:]
        assert tokens(step, 12) == expected
        step.rewind()
        assert tokens(step, 12) == expected
        assert step.backend.position() == CONTEXT + 12
        evidence = step.evidence()
        step.close()
    assert evidence == {
        "mode": "default",
        "compiled_graphs": 1,
        "graph_breaks": 0,
        "graph_break_reasons": [],
        "recompilations": 0,
        "cudagraph_skips": 0,
        "rerecorded": False,
    }
    assert compiling(evidence) == []


def test_compiling_begins_with_a_stage_that_says_how_long_it_takes(small: Architecture, dynamo: None) -> None:
    backend = Traceable(setup(small, cache="static"))
    with torch.inference_mode():
        measured = run(backend, execution="compile")
    stages = [rest[0] for what, *rest in backend.asked if what == "stage"]
    [told] = [stage for stage in stages if stage.startswith(LONG)]
    assert told == "build compiled step (default, kept; minutes the first time)"
    assert stages.index("prefill") < stages.index(told) < stages.index("measure")
    assert measured["execution"]["proof_steps"] == STEPS_A_PASS
    assert measured["passes_agree"] is True


class CountsOnTheHost(OnTheHost):
    """Where a CUDA graph freezes the position, Dynamo follows it."""

    def decode_step(self, token: Tensor) -> Tensor:
        logits = self.logits(token, self.place)
        self.place += 1
        return logits

    def position(self) -> int:
        return self.place


def test_a_position_on_the_host_may_be_compiled(
    small: Architecture, dynamo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the first position and once for all others, both before the proof and within `compile_s`."""
    done: list[Compilations] = []

    def proving(*arguments: Any) -> dict[str, Any]:
        done.append(Compilations.now())
        found = prove(*arguments)
        done.append(Compilations.now())
        return found

    monkeypatch.setattr("registry.execution.prove", proving)
    with torch.inference_mode():
        step = compiled(CountsOnTheHost, small)
        step.prepare()
        before, after = done
        assert after == before
        assert tokens(step, 12) == following(step.first_token.tolist(), 12)[1:]
        assert step.evidence()["recompilations"] == 0, "compiled for any position before the window"
        step.close()


class TellsHowFar(CountsOnTheHost):
    furthest = 0

    def seek(self, position: int) -> None:
        self.furthest = max(self.furthest, self.place)
        super().seek(position)


@pytest.mark.parametrize("room", [1, 3])
def test_compiling_takes_no_more_room_than_there_is(small: Architecture, dynamo: None, room: int) -> None:
    with torch.inference_mode():
        step = compiled(TellsHowFar, small, room=room)
        assert step.prepare()["proof_steps"] == room
        assert step.backend.furthest == CONTEXT + room  # type: ignore[attr-defined]
        step.close()


def test_a_process_may_compile_many_steps(small: Architecture, dynamo: None) -> None:
    """Dynamo compiles one piece of code eight times, and a step's is the same for every backend."""
    with torch.inference_mode():
        for _ in range(10):
            step = compiled(Traceable, small, room=2)
            step.prepare()
            assert (step.evidence()["compiled_graphs"], step.evidence()["graph_breaks"]) == (1, 0)
        step.close()


LATE = PROOF_STEPS + 2


class ChangesLate(CountsOnTheHost):
    """Takes another path once it is further in than the proof looks."""

    def decode_step(self, token: Tensor) -> Tensor:
        logits = super().decode_step(token)
        return logits * 2 if self.place > CONTEXT + LATE else logits


def test_a_recompilation_inside_the_window_is_told(small: Architecture, dynamo: None) -> None:
    with torch.inference_mode():
        measured = run(
            ChangesLate(setup(small, cache="static")), replace(PROTOCOL, measured_steps=LATE + 4), "compile"
        )
    assert measured["execution"]["recompilations"] == 1, "the second pass met it compiled"
    assert measured["execution"]["graph_breaks"] == 0
    assert compiling(measured["execution"]) == [
        "recompilations while steps were timed: 1; those steps hold the compiler's time"
    ]


class AsksTheHost(Traceable):
    def decode_step(self, token: Tensor) -> Tensor:
        return super().decode_step(token) + 0 * float(token[0])


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize(("kind", "what"), [(AsksTheHost, "Tensor.item()"), (Counter, "gc.isenabled")])
def test_graph_breaks_are_told_with_their_reasons(
    small: Architecture, dynamo: None, kind: type[Counter], what: str
) -> None:
    with torch.inference_mode():
        step = compiled(kind, small)
        step.backend.telling = False  # type: ignore[attr-defined]
        step.prepare()
        assert tokens(step, 6) == following(step.first_token.tolist(), 6)[1:]
        evidence = step.evidence()
        step.close()
    assert evidence["graph_breaks"] > 0
    # The counter's list grows step by step, on which Dynamo may or may not compile again: another warning's matter.
    [told] = [warning for warning in compiling(evidence) if warning.startswith("graph breaks")]
    assert told.startswith(f"graph breaks: {evidence['graph_breaks']}; Python runs between the ")
    reasons = evidence["graph_break_reasons"]
    assert all(reason and "\n" not in reason and reason in told for reason in reasons)
    assert any(what in reason for reason in reasons), reasons


@pytest.mark.filterwarnings("ignore")  # of Inductor's own modules
def test_a_mode_that_promises_graphs_tells_that_there_are_none(small: Architecture) -> None:
    """On the CPU there never are: the warning is what a cell of this mode gets there."""
    with torch.inference_mode():
        step = compiled(Traceable, small, "reduce-overhead")
        step.prepare()
        assert tokens(step, 6) == following(step.first_token.tolist(), 6)[1:]
        evidence = step.evidence()
        step.close()
    assert evidence["cudagraph_skips"] == 1
    assert compiling(evidence) == [
        "CUDA graphs skipped: 1; mode reduce-overhead promises them, and Python launched what it skipped"
    ]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of Inductor's own modules
@pytest.mark.parametrize("mode", COMPILE_MODES)
def test_transformers_step_compiles_whole_in_every_mode_on_cuda(architecture: Architecture, mode: str) -> None:
    """One graph; where the mode records CUDA graphs none is skipped, none is recorded while steps are timed, and
    none is left to hold memory."""
    from torch._inductor.cudagraph_trees import get_manager

    backend = HfBackend(setup(architecture, "cuda", "static"))
    with torch.inference_mode():
        backend.load(CONTEXT + STEPS_A_PASS)
        launched = ExecutionConfig("compile", "compile", "static", mode)
        measured = measure(backend, launched, PROTOCOL, 20.5, lambda _: None)
        backend.close()
    execution = measured["execution"]
    assert compiling(execution) == []
    assert execution["compiled_graphs"] == 1
    assert execution["proof_correlation"] >= MIN_CORRELATION
    assert measured["final_position"] == CONTEXT + STEPS_A_PASS
    assert get_manager(torch.cuda.current_device(), create_if_none_exists=False) is None


class Miscompiled(Traceable):
    """Other logits where it is compiled, of the same choice."""

    def logits(self, token: Tensor, position: Any) -> Tensor:
        logits = super().logits(token, position)
        if torch.compiler.is_compiling():
            logits[:, ::2] += 0.1
        return logits


def test_a_compiled_step_that_is_not_eager_s_is_incorrect(small: Architecture, dynamo: None) -> None:
    with torch.inference_mode(), pytest.raises(Refused) as caught:
        compiled(Miscompiled, small).prepare()
    assert caught.value.refusal.outcome is Outcome.INCORRECT
    assert caught.value.refusal.reason.startswith("the compiled step's logits correlate by 0.8")
    assert f"{MIN_CORRELATION} is the least" in caught.value.refusal.reason


def fails(message: str, error: type[Exception] = RuntimeError) -> Any:
    """A compiler that says this and no more."""

    def compiler(graph: Any, inputs: Any) -> Any:
        raise error(message)

    return compiler


COMPILER_SAYS = """C++ compile error

Command:
g++ step.cpp

Output:
step.cpp:7:3: error: 'half2' was not declared in this scope
compilation terminated.
"""


@pytest.mark.parametrize(
    ("message", "outcome", "reason", "remedy"),
    [
        (
            COMPILER_SAYS,
            Outcome.UNSUPPORTED,
            "the step cannot be compiled: step.cpp:7:3: error: 'half2' was not declared in this scope",
            "Use execution=eager",
        ),
        (
            "no lowering for aten::odd\n  target: aten::odd",
            Outcome.UNSUPPORTED,
            "the step cannot be compiled: no lowering for aten::odd",
            "Use execution=eager",
        ),
        (
            "In a subprocess:\nTraceback (most recent call last):\n  at 1\nOutOfResources: shared",
            Outcome.UNSUPPORTED,
            "the step cannot be compiled: OutOfResources: shared",
            "Use execution=eager",
        ),
        (
            "No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')",
            Outcome.MISSING_DEPENDENCY,
            "torch.compile lacks a compiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: "
            "(None, 'g++')",
            "Install g++, or name a C++ compiler in CXX",
        ),
        (
            "Traceback (most recent call last):\nRuntimeError: Failed to find C compiler. Please specify via CC",
            Outcome.MISSING_DEPENDENCY,
            "torch.compile lacks a compiler: RuntimeError: Failed to find C compiler. Please specify via CC",
            "Install gcc, or name a C compiler in CC",
        ),
    ],
)
def test_a_failed_compilation_is_told_by_the_compiler_s_last_word(
    small: Architecture, monkeypatch: pytest.MonkeyPatch, message: str, outcome: Outcome, reason: str, remedy: str
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fails(message)))
    with torch.inference_mode(), pytest.raises(Refused) as caught:
        compiled(Traceable, small).prepare()
    assert caught.value.refusal == Refusal(outcome, reason, remedy)


def test_memory_that_runs_out_in_a_compilation_is_no_failed_compilation(
    small: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = fails("CUDA out of memory", torch.OutOfMemoryError)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    with torch.inference_mode(), pytest.raises(torch.OutOfMemoryError):
        compiled(Traceable, small).prepare()


def test_a_step_of_which_nothing_is_compiled_is_unsupported(
    small: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda step, mode: step)  # as TORCHDYNAMO_DISABLE has it
    with torch.inference_mode(), pytest.raises(Refused, match="compiled nothing of the step") as caught:
        compiled(Traceable, small).prepare()
    assert caught.value.refusal.outcome is Outcome.UNSUPPORTED


# Fidelity


@pytest.fixture(scope="session")
def cut(architecture: Architecture) -> Architecture:
    return architecture.cut(LAYERS)


class OtherWeights(NoQuant):
    """One layer multiplies with other weights than it says."""

    def dequantize(self, module: Any) -> Tensor:
        weight = super().dequantize(module)
        return weight.roll(1, 0) if weight.shape[0] > weight.shape[1] else weight


class OnePositionOff(HfBackend):
    """Forgets the last token of the cache."""

    def decode_step(self, token: Tensor) -> Tensor:
        self.seek(self.position() - 1)
        return super().decode_step(token)


class WrongAtLast(HfBackend):
    """A little wrong in the last step alone: a cosine of 0.995 there, and in the mean more than is asked for."""

    def decode_step(self, token: Tensor) -> Tensor:
        logits = super().decode_step(token)
        return logits + logits.flip(-1) / 10 if self.position() == PREFIX + STEPS else logits


class OneStreamWrong(HfBackend):
    def decode_step(self, token: Tensor) -> Tensor:
        logits = super().decode_step(token)
        logits[1] = logits[1].flip(-1)
        return logits


class NotANumber(HfBackend):
    def decode_step(self, token: Tensor) -> Tensor:
        logits = super().decode_step(token)
        logits[0, 0] = math.nan
        return logits


class LacksATensor(HfBackend):
    def dequantized(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor) for name, tensor in super().dequantized() if "norm" not in name)


class HasOneTooMany(HfBackend):
    def dequantized(self) -> Iterator[tuple[str, Tensor]]:
        yield from super().dequantized()
        yield "model.layers.0.extra", torch.zeros(1)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_same_model_agrees_with_itself(cut: Architecture, cache: str) -> None:
    with torch.inference_mode():
        backend = HfBackend(setup(cut, cache=cache))
        fidelity = compare(backend, seed=0)
    assert fidelity.logit_cosine == pytest.approx(1, abs=1e-4)
    assert fidelity.top1_agreement > 0.9
    assert fidelity.positions == STEPS + 1
    assert fidelity.require() == {
        "logit_cosine": fidelity.logit_cosine,
        "top1_agreement": fidelity.top1_agreement,
        "positions": STEPS + 1,
    }
    assert backend.model is None, "closed"


@pytest.mark.parametrize("wrong", [OnePositionOff, WrongAtLast, OneStreamWrong, NotANumber])
def test_a_backend_that_answers_wrongly_is_incorrect(cut: Architecture, wrong: type[HfBackend]) -> None:
    with torch.inference_mode():
        fidelity = compare(wrong(setup(cut)), seed=0)
    with pytest.raises(Refused, match="logits reach a cosine of") as caught:
        fidelity.require()
    assert caught.value.refusal.outcome is Outcome.INCORRECT


def test_a_format_that_multiplies_wrongly_is_incorrect(cut: Architecture) -> None:
    with torch.inference_mode():
        fidelity = compare(HfBackend(replace(setup(cut), linear=OtherWeights(NoOptions()))), seed=0)
    with pytest.raises(Refused, match="logits reach a cosine of"):
        fidelity.require()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [(LacksATensor, r"missing \['model\.layers\.0\.input_layernorm\.weight'"), (HasOneTooMany, "unknown .*extra")],
)
def test_weights_that_are_not_the_model_s_are_incorrect(
    cut: Architecture, wrong: type[HfBackend], words: str
) -> None:
    backend = wrong(setup(cut))
    with torch.inference_mode(), pytest.raises(Refused, match=words) as caught:
        compare(backend, seed=0)
    assert caught.value.refusal.outcome is Outcome.INCORRECT
    assert backend.model is None, "closed"


@pytest.mark.parametrize("cosine", [MIN_COSINE - 1e-6, 0.0, -1.0, math.nan])
def test_too_little_agreement_is_incorrect(cosine: float) -> None:
    with pytest.raises(Refused, match=r"0\.999 is the least"):
        Fidelity(cosine, 1.0, 9).require()


def test_enough_agreement_is_enough() -> None:
    assert Fidelity(MIN_COSINE, 0.5, 9).require()["logit_cosine"] == MIN_COSINE


def test_what_goes_wrong_in_loading_is_what_is_told(cut: Architecture) -> None:
    class Broken(RandomWeights):
        def tensor(self, *_: Any) -> Tensor:
            raise ValueError("broken on purpose")

    with pytest.raises(ValueError, match="broken on purpose"):
        compare(HfBackend(replace(setup(cut), weights=Broken(0))), seed=0)
    with pytest.raises(ValueError, match="no-such-model"):
        compare(HfBackend(setup(replace(cut, model_type="no-such-model"))), seed=0)
