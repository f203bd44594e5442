"""The command line before anything is measured: what is refused, what only tells, and how a cell is planned."""

import importlib.metadata
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from planning import CPU, H200, Plan, refused
from safetensors.numpy import save_file
from sweeps import told
from test_record import made_up_record

from registry import floor, identity, sweep
from registry import record as records
from registry.api import LinearFormat, Requirement, unsupported
from registry.architecture import CONFIG_JSON_NAMES, Architecture
from registry.checkpoint import expected_tensors
from registry.compose import CONF, Composer
from registry.hardware import Device
from registry.outcome import BadInput, Outcome, Refusal
from registry.plan import Cell, Planner
from registry.plugins import KINDS, Catalog
from registry.schema import GpuConfig

ROOT = CONF.parent
HEAVY = ("torch", "transformers", "mlflow", "bitsandbytes")

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def light(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment without a GPU, in which importing anything heavy fails."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({HEAVY}))\n")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def call(light: dict[str, str], tmp_path: Path) -> Call:
    """Call runner.py in an empty folder, which stays empty."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "runner.py"), *arguments]
        done = subprocess.run(command, cwd=cwd, env=light, capture_output=True, text=True, timeout=120)
        assert list(cwd.iterdir()) == []
        return done

    return call


# Bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["modle=tiny"], "did you mean model?"),
        (["model=tinny"], "did you mean tiny?"),
        (["protocol.contxt=3"], "did you mean protocol.context"),
        (["quant=nf4", "quant.options.blok_size=32"], "did you mean block_size?"),
        (["quant=nf4", "+quant.options.blok_size=32"], "no option quant.options.blok_size: did you mean block_size?"),
        (["gpu=h100", "+quant.options.x=1"], "none has no option quant.options.x"),
        (["quant.plugin=nf5"], "no quant plugin is called 'nf5': did you mean nf4?"),
        (["execution.cache=statik"], "did you mean static?"),
        (["model=tiny", "context=5000"], "tiny takes 4096: at most context=4061"),
        (["protocol.profiled_steps=1001"], "protocol.profiled_steps=1001: at most 1000"),
        (["protocol.measured_steps=0"], "protocol.measured_steps=0: at least 1"),
        (["measured_steps=0"], "no key is called 'measured_steps': did you mean protocol.measured_steps?"),
        (["attention.options.kernel=flsh"], "attention.options.kernel=flsh: did you mean flash?"),
        (["quant=nf4", "quant.options.block_size=65"], "quant.options.block_size=65: Known: 1024, 128"),
        (["protocol.timeout_s=nan"], "protocol.timeout_s=nan"),
        (["model.weights=nowhere"], "model.weights=nowhere: no such folder"),
        (["gpu=h100", "gpu.peak_bandwidth_gbs=null"], "'h100' has no bandwidth"),
        (["gpu.peak_bandwidth_gbs=-1"], "gpu.peak_bandwidth_gbs=-1"),
        (["model=tiny,qwen2.5-0.5b"], "add -m: python runner.py -m model=tiny,qwen2.5-0.5b"),
        (["-m", "model=qwen2.5-0.5b,tiny", "context=512,5000"], "(in: model=tiny context=5000)"),
        (["-m", "tracking.experiment=a,b"], "one tracking for all of its cells"),
        (["-m", "experiment=matrix,quant"], "one number of sessions for all of its cells: give protocol.sessions=N"),
        (["model._target_=os.system"], "_target_"),
        (["hydra.callbacks=null"], "hydra.callbacks=null: of Hydra's own keys a call may set"),
        (["--config-dir", "/tmp"], "--config-dir"),
        (["--cfg", "job", "modle=tiny"], "did you mean model?"),
        (["--help", "model=tinny"], "did you mean tiny?"),
        (["--cfg", "job", "-m", "context=1,2"], "leave out -m"),
        (["--hydra-help", "attention=fa2"], "takes no overrides"),
        (["--cfg", "job", "--info"], "--cfg and --info exclude each other"),
        (["--run", "-m", "model=tiny"], "--run and --multirun exclude each other: leave out -m"),
        (["--help", "-m", "model=tiny", "context=1,2"], "leave out -m, and give each key one value"),
        (["--info", "config", "--resolve"], "--resolve goes with --cfg"),
        (["--dryrun"], "unrecognized arguments: --dryrun"),
        (["model=tiny", "-m", "context=64,128"], "Flags come before the overrides: python runner.py -m"),
        (["records=/dev/null/records"], "/dev/null is no folder"),
        (["records=/proc/new"], "records=/proc/new cannot be written: "),
        (["tracking.uri=sqlite:////proc/x.db"], "tracking.uri=sqlite:////proc/x.db cannot be written: "),
        (["tracking.uri=mongodb://u:hunter2@host/x"], "did you mean sqlite:///mlflow.db?"),
        (["tracking.uri=http://u:hunter2@a,http://b"], "add -m"),
        (["tracking.uri=sqlite:///no/folder/mlflow.db"], "there is no folder no/folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_one_line(call: Call, arguments: list[str], words: str) -> None:
    line = told(call(*arguments))
    assert words in line
    assert "hunter2" not in line


def test_every_bad_cell_is_told_once(call: Call) -> None:
    done = call("-m", "model=tiny,qwen2.5-0.5b", "context=5000,40000", "quant=none,nf4")
    assert done.returncode == 2
    assert done.stdout == ""
    assert [re.search(r"context=\d+ with", line)[0] for line in done.stderr.splitlines()] == [
        "context=5000 with",
        "context=40000 with",
        "context=40000 with",
    ]


def test_a_file_that_is_no_database_is_refused_and_left_alone(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a database, and longer than the header of one")
    assert "no SQLite database" in told(call(f"tracking.uri=sqlite:///{file}"))
    assert file.read_text().startswith("not a database")


@pytest.fixture
def weights(architecture: Architecture, tmp_path: Path) -> Path:
    """A sound folder of weights for the tiny model."""
    folder = tmp_path / "weights"
    folder.mkdir()
    numbers = {theirs: getattr(architecture, ours) for ours, theirs in CONFIG_JSON_NAMES.items()}
    numbers |= {"rope_theta": architecture.rope_theta, "head_dim": architecture.head_dim}
    (folder / "config.json").write_text(json.dumps(numbers))
    tensors = {name: np.zeros(shape, np.float16) for name, shape in expected_tensors(architecture).items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_folder_of_weights_is_planned_without_torch(call: Call, weights: Path) -> None:
    done = call("model=tiny", f"model.weights={weights}", "dry_run=true")
    assert done.returncode == 0, done.stderr


def test_a_truncated_file_is_refused(call: Call, weights: Path) -> None:
    file = weights / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert f"{file} is truncated" in told(call("model=tiny", f"model.weights={weights}"))


def test_weights_of_another_architecture_are_refused(call: Call, weights: Path) -> None:
    line = told(call("model=qwen2.5-0.5b", f"model.weights={weights}"))
    assert "holds another architecture than qwen2.5-0.5b" in line
    assert "layers 3 (wanted 24)" in line


# Telling, and running nothing


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], "context=4096 is short for protocol.context=4096"),
        (["--hydra-help"], "--info"),
        (["--info", "config"], "qwen2.5-0.5b"),
        (["--info", "plugins"], "Installed Hydra Plugins"),
        (["--cfg", "job", "model=tiny"], "made for rfloor's tests"),
        (["--version"], "1.3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_only_tells_exits_with_0(call: Call, arguments: list[str], words: str) -> None:
    done = call(*arguments)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
    assert done.stderr == ""


MODELS = ("qwen2.5-7b", "mistral-7b-v0.3", "llama-3.1-8b")
GPUS = ("h100", "a100-80gb", "l40s", "l4")
CONTEXTS = (2048, 4096, 8192, 16384)


def test_a_dry_run_has_a_row_a_cell_and_says_what_would_refuse(call: Call, composer: Composer) -> None:
    axes = [f"model={','.join(MODELS)}", f"gpu={','.join(GPUS)}", f"context={','.join(map(str, CONTEXTS))}"]
    done = call("-m", "dry_run=true", *axes)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r" *\d+ ", line)]
    expected = []
    for number, (model, gpu, context) in enumerate(itertools.product(MODELS, GPUS, CONTEXTS), start=1):
        config = composer.cell([f"model={model}", f"gpu={gpu}"])
        architecture = Architecture.of(config.model)
        attended = floor.study_bytes(architecture, 16, floor.mean_context(context, 5, 30))
        need = floor.stored_weight_bytes(architecture, 16) + floor.kv_bytes(architecture, context + 35)
        floor_ms = f"{floor.floor_ms(attended, config.gpu.peak_bandwidth_gbs):.3f}"
        memory = [f"{need / 1e9:.2f}", f"{config.gpu.memory_gb:.0f}"]
        expected.append([str(number), model, gpu, str(context), floor_ms, *memory, "unsupported"])
    assert rows == expected
    told = " ".join(done.stdout.split())
    assert "#1-4, 17-20, 33-36 unsupported: gpu=h100 is the profile of NVIDIA H100 80GB HBM3, this machine" in told


def test_a_dry_run_shows_the_floor_of_the_study_s_convention(call: Call) -> None:
    done = call("dry_run=true", "gpu=h200", "model=qwen2.5-7b", "protocol=paper")
    assert done.returncode == 0
    assert re.search(r"^ *1 +3\.198 +15\.35 +141 +unsupported", done.stdout, re.MULTILINE)


def test_a_dry_run_of_bad_input_is_bad_input(call: Call) -> None:
    assert "did you mean tiny?" in told(call("-m", "dry_run=true", "model=tiny,tinny"))


# Planning: the GPU


def test_auto_finds_the_profile_of_the_device(plan: Plan, profiles: dict[str, GpuConfig]) -> None:
    cell = plan("gpu=auto")
    assert cell.refusal is None
    assert cell.config.gpu == profiles["h200"]
    assert cell.device is H200


@pytest.mark.parametrize("device", [CPU, H200])
def test_gpu_cpu_is_the_cpu_whatever_else_is_there(plan: Plan, device: Device) -> None:
    cell = plan("gpu=cpu", device=device)
    assert cell.refusal is None
    assert (cell.device.kind, cell.config.gpu.name) == ("cpu", "cpu")


def test_auto_without_a_gpu_is_the_cpu(plan: Plan) -> None:
    assert plan("gpu=auto", device=CPU).config.gpu.name == "cpu"


@pytest.mark.parametrize("gpu", ["gpu=auto", "gpu=h200"])
def test_a_gpu_that_nobody_can_name_is_not_measured_as_the_cpu(plan: Plan, gpu: str) -> None:
    unseen = replace(CPU, unseen="/dev/nvidia0")
    refusal = refused(plan(gpu, device=unseen), Outcome.MISSING_DEPENDENCY)
    assert "/dev/nvidia0" in refusal.reason
    assert "NVML" in refusal.reason
    assert "gpu=cpu" in refusal.remedy
    assert plan("gpu=cpu", device=unseen).refusal is None


def test_what_is_given_beside_auto_stands(plan: Plan, profiles: dict[str, GpuConfig]) -> None:
    gpu = plan("gpu=auto", "gpu.peak_bandwidth_gbs=4000", "gpu.price_usd_per_hour=3.5").config.gpu
    assert (gpu.name, gpu.peak_bandwidth_gbs, gpu.price_usd_per_hour) == ("h200", 4000, 3.5)
    assert gpu.memory_gb == profiles["h200"].memory_gb
    assert profiles["h200"].peak_bandwidth_gbs == 4800


@pytest.mark.parametrize("device", [H200, CPU], ids=["another GPU", "no GPU"])
def test_another_gpu_s_profile_is_unsupported(plan: Plan, device: Device) -> None:
    refusal = refused(plan("gpu=l4", device=device), Outcome.UNSUPPORTED)
    assert refusal.reason == f"gpu=l4 is the profile of NVIDIA L4, this machine has {device.name}"
    assert "gpu=auto" in refusal.remedy


def test_another_gpu_s_profile_tells_when_the_cell_would_not_fit_there_either(plan: Plan) -> None:
    cell = plan("gpu=l4", "model=llama-3.1-8b", "context=16384", "protocol.batch_size=16", device=CPU)
    refusal = refused(cell, Outcome.UNSUPPORTED)
    assert refusal.remedy == "It would not run there either: it needs 50.5 GB, which has 24 GB"


def test_a_gpu_that_no_profile_knows_is_unsupported_with_what_to_write(plan: Plan) -> None:
    device = replace(H200, name="NVIDIA Whatever 9000")
    refusal = refused(plan("gpu=auto", device=device), Outcome.UNSUPPORTED)
    assert refusal.reason == "no GPU profile is for 'NVIDIA Whatever 9000'"
    assert "Write conf/gpu/NAME.yaml with its nvml_names and peak_bandwidth_gbs" in refusal.remedy
    known = plan("gpu=l4", "gpu.nvml_names=['NVIDIA Whatever 9000']", device=device)
    assert known.refusal is None


def test_a_profile_without_bandwidth_is_bad_input_on_any_machine(plan: Plan) -> None:
    for device in (H200, CPU):
        with pytest.raises(BadInput, match="'l4' has no bandwidth"):
            plan("gpu=l4", "gpu.peak_bandwidth_gbs=null", device=device)


# Planning: memory


def test_what_does_not_fit_is_oom_before_loading(plan: Plan, profiles: dict[str, GpuConfig]) -> None:
    small = Device("cuda", "NVIDIA Small", 10_000_000_000, "GPU-1", (9, 0), "580.1")
    profiles = profiles | {"small": replace(profiles["h200"], name="small", nvml_names=[small.name])}
    cell = Planner(Catalog(), profiles, small).plan(Composer(Catalog()).cell(["model=llama-3.1-8b"]))
    refusal = refused(cell, Outcome.OOM)
    assert refusal.reason == "weights and cache need 16.1 GB, NVIDIA Small has 10.0 GB"
    assert "fewer bits" in refusal.remedy


def test_the_need_is_weights_and_a_full_cache(plan: Plan, profiles: dict[str, GpuConfig]) -> None:
    cell = plan("model=mistral-7b-v0.3", "context=1000", "protocol.batch_size=3")
    a = cell.architecture
    need = 2 * a.parameters + 3 * (1000 + 5 + 30) * 2 * a.layers * a.kv_heads * a.head_dim * 2
    assert cell.memory_need == need
    overrides = ("model=mistral-7b-v0.3", "context=1000", "protocol.batch_size=3")
    assert plan(*overrides, device=replace(H200, memory_bytes=need)).refusal is None
    refused(plan(*overrides, device=replace(H200, memory_bytes=need - 1)), Outcome.OOM)


# Planning: what the plugins say


def test_a_captured_step_needs_a_static_cache(plan: Plan) -> None:
    assert plan("execution=cuda_graph").refusal is None
    refusal = refused(plan("execution=cuda_graph", "execution.cache=dynamic"), Outcome.UNSUPPORTED)
    assert "cache that stays where it is, this one is dynamic" in refusal.reason
    assert refusal.remedy == "Use execution.cache=static"


def test_a_captured_step_needs_cuda(plan: Plan) -> None:
    refusal = refused(plan("execution=cuda_graph", "gpu=cpu"), Outcome.UNSUPPORTED)
    assert "needs a CUDA device, this one is the CPU" in refusal.reason


RECORDING = ["compile-reduce-overhead", "compile-max-autotune"]


@pytest.mark.parametrize("execution", ["compile", *RECORDING])
def test_a_variant_says_which_launch_it_is(plan: Plan, execution: str) -> None:
    cell = plan(f"execution={execution}")
    assert cell.refusal is None
    assert cell.config.execution.launch == "compile"
    assert cell.config.execution.name == execution
    assert f" {execution} " in cell.label


@pytest.mark.parametrize("execution", RECORDING)
def test_graphs_that_torch_compile_records_need_a_static_cache(plan: Plan, execution: str) -> None:
    dynamic = (f"execution={execution}", "execution.cache=dynamic")
    refusal = refused(plan(*dynamic), Outcome.UNSUPPORTED)
    assert "would record a CUDA graph for every length of a dynamic cache" in refusal.reason
    assert refusal.remedy == "Use execution.cache=static, or execution.mode=default"
    assert plan(*dynamic, "execution.mode=max-autotune-no-cudagraphs").refusal is None
    assert plan(*dynamic, "gpu=cpu").refusal is None, "on the CPU none is recorded"
    assert plan("execution=compile", "execution.cache=dynamic").refusal is None


def test_graphs_that_torch_compile_records_need_a_step_that_can_be_captured(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backends.quant.none import NoQuant

    monkeypatch.setattr(NoQuant, "executions", ("eager", "compile"))
    assert plan("execution=compile").refusal is None
    refusal = refused(plan("execution=compile-reduce-overhead"), Outcome.UNSUPPORTED)
    assert refusal.reason == (
        "the quant plugin 'none' cannot be captured, and execution.mode=reduce-overhead records CUDA graphs"
    )
    assert refusal.remedy == "Use execution.mode=default"


@pytest.mark.parametrize("execution", ["execution=cuda_graph", "execution.cache=static"])
def test_the_flash_kernel_needs_a_dynamic_cache_on_cuda(plan: Plan, execution: str) -> None:
    assert plan("attention=sdpa-flash").refusal is None
    refusal = refused(plan("attention=sdpa-flash", execution), Outcome.UNSUPPORTED)
    assert "takes no mask" in refusal.reason
    assert "execution.cache=dynamic" in refusal.remedy


@pytest.mark.parametrize("device", [H200, CPU])
@pytest.mark.parametrize("gpu", ["auto", "l4"])
def test_an_unknown_plugin_option_is_bad_input_on_any_machine(plan: Plan, device: Device, gpu: str) -> None:
    with pytest.raises(BadInput, match=r"nf4 has no option quant\.options\.blocksize: did you mean block_size\?"):
        plan("quant=nf4", "+quant.options.blocksize=64", f"gpu={gpu}", device=device)


def test_an_option_of_the_wrong_type_is_bad_input(plan: Plan) -> None:
    with pytest.raises(BadInput, match=r"quant\.options: .*abc"):
        plan("quant=nf4", "quant.options.block_size=abc")


def test_options_that_are_left_out_are_in_the_cell(plan: Plan) -> None:
    assert plan("quant=nf4", "quant.options={}").config.quant.options == {
        "block_size": 64,
        "levels": "nf4",
        "double_quant": False,
    }


@dataclass(frozen=True)
class MadeUpOptions:
    width: int = 1


class MadeUp(LinearFormat):
    """A format on which each test changes what it declares."""

    convert = dequantize = None  # type: ignore[assignment]


def catalog_of(monkeypatch: pytest.MonkeyPatch, *plugins: type[MadeUp]) -> Catalog:
    """The real plugins, and `made-up` once for each class given."""
    entries = [entry for group in KINDS.values() for entry in importlib.metadata.entry_points(group=group)]
    for number, plugin in enumerate(plugins):
        module = types.ModuleType(f"made_up_{number}")
        module.Plugin = plugin  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        entries.append(importlib.metadata.EntryPoint("made-up", f"{module.__name__}:Plugin", KINDS["quant"]))
    return Catalog(entries)


@pytest.fixture
def made_up(plan: Plan, composer: Composer, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Plan a cell with a format that declares what is given."""

    def made_up(*overrides: str, device: Device = H200, times: int = 1, **declared: Any) -> Cell:
        plugin = type("Declared", (MadeUp,), declared)
        overrides = ("quant.plugin=made-up", *overrides)
        return plan(*overrides, device=device, catalog=catalog_of(monkeypatch, *[plugin] * times))

    return made_up


MISSING = (Requirement("no-such-package-anywhere", "pip install it"),)


def test_a_missing_package_is_told_with_the_command_that_brings_it(made_up: Plan) -> None:
    assert made_up().refusal is None
    refusal = refused(made_up(requires=MISSING), Outcome.MISSING_DEPENDENCY)
    assert refusal == Refusal(
        Outcome.MISSING_DEPENDENCY, "no-such-package-anywhere is not installed", "pip install it"
    )


def test_a_package_that_is_too_old_is_told_with_both_versions(made_up: Plan) -> None:
    version = importlib.metadata.version("numpy")
    refusal = refused(made_up(requires=(Requirement("numpy>=999", "pip install numpy"),)), Outcome.MISSING_DEPENDENCY)
    assert refusal.reason == f"numpy {version} is installed, numpy>=999 is needed"
    assert made_up(requires=(Requirement("numpy>=1", "pip install numpy"),)).refusal is None


def says_no(cls: type, request: Any) -> None:
    raise unsupported("it says no")


NO = classmethod(says_no)
CUDA_ONLY, CPU_ONLY = ("cuda",), ("cpu",)


@pytest.mark.parametrize(
    ("overrides", "device", "declared", "reason"),
    [
        (["gpu=l4"], H200, {}, "gpu=l4 is the profile of"),
        (["gpu=l4"], H200, {"times": 2}, "gpu=l4 is the profile of"),
        ([], CPU, {"devices": CUDA_ONLY}, "'made-up' runs on cuda, this device is cpu"),
        ([], H200, {"devices": CPU_ONLY}, "'made-up' runs on cpu, this device is cuda"),
        ([], H200, {"min_capability": (10, 0)}, "needs compute capability 10.0, this device has 9.0"),
        (["execution=cuda_graph"], H200, {}, "'made-up' cannot be launched by execution=cuda_graph"),
        (["execution=compile"], H200, {}, "'made-up' cannot be launched by execution=compile"),
        (["execution.cache=static"], H200, {"caches": ("dynamic",)}, "works on a dynamic cache, not on a static one"),
        (["model=llama-3.1-8b"], replace(H200, memory_bytes=10**10), {"check": NO}, "it says no"),
    ],
)
def test_what_a_machine_cannot_do_comes_before_what_it_lacks(
    made_up: Plan, overrides: list[str], device: Device, declared: dict[str, Any], reason: str
) -> None:
    refusal = refused(made_up(*overrides, device=device, requires=MISSING, **declared), Outcome.UNSUPPORTED)
    assert reason in refusal.reason
    assert refusal.remedy or declared.get("check") is NO


def test_what_a_machine_lacks_comes_before_its_memory(made_up: Plan) -> None:
    small = replace(H200, memory_bytes=10**10)
    refused(made_up("model=llama-3.1-8b", device=small), Outcome.OOM)
    refused(made_up("model=llama-3.1-8b", device=small, requires=MISSING), Outcome.MISSING_DEPENDENCY)


def raises(cls: type, request: Any) -> None:
    raise RuntimeError("broken on purpose")


@pytest.mark.parametrize(
    "declared",
    [
        {"check": classmethod(raises)},
        {"__init__": raises},
        {"Options": int},
        {"requires": (Requirement("no name = at all", ""),)},
        {"min_capability": "9.0"},
    ],
    ids=lambda declared: next(iter(declared)),
)
def test_a_plugin_that_declares_nonsense_is_one_cell_s_crash(made_up: Plan, declared: dict[str, Any]) -> None:
    refusal = refused(made_up(**declared), Outcome.CRASH)
    assert "the quant plugin 'made-up' raised" in refusal.reason


def test_a_backend_that_hosts_no_such_format_is_unsupported(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from backends.hf import HfBackend

    monkeypatch.setattr(HfBackend, "formats", ("none",))
    refusal = refused(plan("quant=nf4"), Outcome.UNSUPPORTED)
    assert refusal.reason == "backend=hf does not host quant=nf4"
    assert refusal.remedy == "It hosts none"


def test_a_quant_brings_its_backend_where_none_is_named(plan: Plan) -> None:
    for overrides in (["quant.backend=null"], ["quant.backend=hf"], ["quant.backend=other", "backend=hf"]):
        backend = plan(*overrides).config.backend
        assert (backend.name, backend.plugin) == ("hf", "hf")
    with pytest.raises(BadInput, match="no backend plugin is called 'other'"):
        plan("quant.backend=other")


# A cell's identity


@pytest.mark.parametrize(
    "overrides",
    [
        ["tracking.uri=sqlite:///other.db"],
        ["tracking=server", "tracking.experiment=other"],
        ["records=elsewhere"],
        ["protocol.timeout_s=5"],
        ["protocol.profiled_steps=10"],
        ["dry_run=true"],
        ["sweep_id=other"],
        ["gpu=h200"],
        ["gpu=h200", "gpu.name=mine"],
        ["gpu.price_usd_per_hour=9"],
        ["+gpu.sources.price_usd_per_hour=another list"],
        ["gpu.nvml_names=[NVIDIA H200,NVIDIA H200 NVL]"],
        ["gpu.memory_gb=100"],
        ["gpu.compute_capability='8.9'"],
        ["model.source=another page"],
        ["model.name=mine"],
        ["model.max_context=4096"],
        ["model.revision=v2"],
        ["quant.weight_bits=8"],
        ["quant.backend=hf"],
        ["backend=hf"],
        ["context=512"],
        ["protocol=paper", "context=512"],
        ["protocol.sessions=10"],
        ["execution.name=mine", "execution.launch=eager"],
        ["resume=true"],
        ["on_busy=refuse"],
        ["cache.folder=elsewhere"],
        ["cache.limit_gb=1"],
        ["session=1"],
        ["place=7"],
        ["registration=abc"],
    ],
    ids=" ".join,
)
def test_the_same_measurement_has_the_same_identity(plan: Plan, overrides: list[str]) -> None:
    assert plan(*overrides).cell_id == plan().cell_id


def test_what_a_cell_is_measured_for_is_not_its_identity(plan: Plan) -> None:
    arm = plan("experiment=graphs_ab", "model=tiny", "context=64", "protocol=quick", "execution=eager")
    assert arm.experiment == "graphs_ab"
    alike = {key: getattr(arm.config.execution, key) for key in ("launch", "cache")}
    own = [f"execution.{key}={value}" for key, value in alike.items()]
    assert arm.cell_id == plan("model=tiny", "context=64", "protocol=quick", *own).cell_id


def test_on_the_cpu_the_threads_are_those_that_a_step_has(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another quota or affinity is another measurement, and to ask for the threads that there are is none."""
    ids = {}
    for cores in (2, 4):
        monkeypatch.setattr(identity, "physical_cores", lambda cores=cores: cores)
        ids[cores] = plan("gpu=cpu", device=CPU).cell_id
        assert plan("gpu=cpu", f"protocol.threads={cores}", device=CPU).cell_id == ids[cores]
    assert ids[2] != ids[4]
    assert plan("gpu=cpu", "protocol.threads=2", device=CPU).cell_id == ids[2]
    of_a_gpu = plan().cell_id
    monkeypatch.setattr(identity, "physical_cores", lambda: 2)
    assert plan().cell_id == of_a_gpu


def test_whatever_changes_a_measurement_changes_its_identity(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [
        [],
        ["model=tiny"],
        ["model.weights=owner/name"],
        ["model.weights=owner/name", "model.revision=v2"],
        ["model=llama-3.1-8b"],
        ["model=llama-3.1-8b", "model.max_context=65536"],
        ["model.rope_theta=10000"],
        ["context=513"],
        ["protocol=attention", "context=513"],
        ["protocol.seed=1"],
        ["protocol.batch_size=2"],
        ["protocol.warmup_steps=6"],
        ["protocol.measured_steps=31"],
        ["protocol.threads=1"],
        ["execution=cuda_graph"],
        ["execution=compile"],
        ["execution=compile-reduce-overhead"],
        ["execution.cache=static"],
        ["attention=sdpa-math"],
        ["quant=nf4"],
        ["quant=nf4", "quant.options.block_size=128"],
        ["quant=nf4-double"],
        ["quant.study_bits=4"],
        ["gpu.peak_bandwidth_gbs=4000"],
        ["gpu=cpu"],
    ]
    cells = [plan(*one) for one in overrides]
    cells += [plan(device=replace(H200, driver="581.2"))]
    versions = cells[0].versions
    monkeypatch.setattr("registry.plan.collect_versions", lambda *_: versions | {"torch": "0.0"})
    cells += [plan()]
    assert all(re.fullmatch("[0-9a-f]{16}", cell.cell_id) for cell in cells)
    assert len({cell.cell_id for cell in cells}) == len(overrides) + 2


def test_how_a_folder_s_weights_are_stored_is_part_of_its_cell_s_identity(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = set()
    for stored in ({}, {"quantised": {"bits": 4.25}}, {"quantised": {"bits": 5.0}}):
        monkeypatch.setattr("registry.plan.check_weights", lambda *_, stored=stored: stored)
        ids.add(plan("model.weights=owner/name").cell_id)
    assert len(ids) == 3
    ids.add(plan("model.weights=other/name", "model.revision=v2").cell_id)  # the same weights, elsewhere
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("CUDA_LAUNCH_BLOCKING", ("1", "0")),
        ("TORCHDYNAMO_DISABLE", ("1",)),
        ("ATEN_CPU_CAPABILITY", ("default", "avx2")),
        ("NVIDIA_TF32_OVERRIDE", ("0",)),
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", ("1",)),
        ("CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")),
        ("TORCHINDUCTOR_MAX_AUTOTUNE", ("1",)),
        ("CUDA_DEVICE_MAX_CONNECTIONS", ("1",)),
        ("TRITON_INTERPRET", ("1",)),
        ("CUDA_SCALE_LAUNCH_QUEUES", ("4x", "0.25x")),
        ("LD_PRELOAD", ("",)),
        ("MALLOC_ARENA_MAX", ("1",)),
        ("BNB_CUDA_VERSION", ("128",)),
        ("NVCC_APPEND_FLAGS", ("-O1",)),
        ("NVCC_PREPEND_FLAGS", ("-O1",)),
    ],
)
def test_a_variable_that_changes_a_step_is_part_of_a_cell_s_identity(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, name: str, values: tuple[str, ...]
) -> None:
    monkeypatch.delenv(name, raising=False)
    ids = [plan().cell_id]
    for value in values:
        monkeypatch.setenv(name, value)
        cell = plan()
        assert cell.variables[name] == value
        ids.append(cell.cell_id)
    assert len({*ids}) == 1 + len(values)
    monkeypatch.delenv(name)
    assert plan().cell_id == ids[0]


@pytest.mark.parametrize(
    "name",
    [
        *("HOME", "HF_TOKEN", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "OMP_NUM_THREADS", "LANG"),
        *("SLURM_JOB_ID", "KMP_DUPLICATE_LIB_OK", "OMP_DISPLAY_ENV", "TORCHDYNAMO_VERBOSE", "FLASHINFER_LOGLEVEL"),
        "TRITON_PRINT_AUTOTUNING",
    ],
)
def test_a_variable_that_changes_no_step_is_no_identity(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = plan()
    monkeypatch.setenv(name, "another")
    assert (plan().cell_id, plan().variables) == (before.cell_id, before.variables)


def test_a_secret_among_the_variables_is_hidden() -> None:
    told = identity.step_variables({"TRITON_API_TOKEN": "kanary-1", "OMP_PLACES": "kanary-2", "HF_TOKEN": "kanary-2"})
    assert not [value for value in told.values() if "kanary" in value]


def test_a_branch_of_the_hub_that_moved_is_another_measurement(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    main = tmp_path / "models--owner--name" / "refs" / "main"
    main.parent.mkdir(parents=True)
    ids = []
    for commit in ("1" * 40, "2" * 40):
        main.write_text(commit)
        ids.append(plan("model.weights=owner/name").cell_id)
        assert plan("model.weights=owner/name", f"model.revision='{commit}'").cell_id == ids[-1]
    assert ids[0] != ids[1]


def test_which_of_several_equal_gpus_measures_is_no_identity(plan: Plan) -> None:
    assert plan(device=replace(H200, uuid="GPU-other")).cell_id == plan().cell_id


def test_versions_are_the_runtime_s_and_those_of_the_packages_that_a_plugin_needs(made_up: Plan) -> None:
    assert {"python", "rfloor", "torch", "transformers", "numpy"} <= set(made_up().versions)
    needy = made_up(requires=(Requirement("rich>=1", "pip install rich"),))
    assert needy.versions["rich"] == importlib.metadata.version("rich")
    assert "rich" not in made_up().versions


PACKAGE = {
    "__init__.py": "",
    "plugin.py": "from .relative import x\nfrom made_up_sources import sibling\ndef f(): import made_up_sources.late",
    "relative.py": "from . import further\nx = 1",
    "further.py": "",
    "sibling.py": "import json",
    "late.py": "",
    "sub/__init__.py": "from ..relative import x",
    "unrelated.py": "",
}


@pytest.mark.parametrize("file", PACKAGE)
def test_a_plugin_s_sources_are_part_of_its_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "made_up_sources"
    for name, text in PACKAGE.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    digest = identity.source_digest.__wrapped__  # each file is read once a process
    before = digest("made_up_sources.plugin")
    (package / file).write_text(PACKAGE[file] + "\ny = 2")
    changed = digest("made_up_sources.plugin") != before
    assert changed == (file not in ("unrelated.py", "sub/__init__.py"))


@pytest.mark.parametrize("content", [b"class Plugin(:", b"\x7fELF\0\0"], ids=["broken", "compiled"])
def test_sources_that_cannot_be_parsed_have_an_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "made_up_unparsable.py"
    file.write_bytes(content)
    before = identity.source_digest.__wrapped__("made_up_unparsable")
    file.write_bytes(content + b" ")
    assert identity.source_digest.__wrapped__("made_up_unparsable") != before


def test_the_measuring_code_is_part_of_every_identity_and_the_reporting_code_of_none() -> None:
    names = {file.name for file in identity._reachable(identity.WORKER)}
    assert {
        "worker.py",
        "measure.py",
        "execution.py",
        "proof.py",
        "fidelity.py",
        "api.py",
        "hosting.py",
        "weights.py",
    } <= names
    assert not {"display.py", "tracking.py", "sweep.py", "cli.py", "testing.py"} & names


def test_an_identity_is_the_same_in_another_process(plan: Plan, light: dict[str, str], tmp_path: Path) -> None:
    code = (
        "from registry.compose import Composer; from registry.hardware import Device\n"
        "from registry.plan import Planner; from registry.plugins import Catalog\n"
        "composer = Composer(Catalog())\n"
        f"print(Planner(Catalog(), composer.profiles(), {H200}).plan(composer.cell(['quant=nf4'])).cell_id)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=light | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == plan("quant=nf4").cell_id


def test_a_cell_runs_as_it_was_planned(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of weights that goes away while the sweep runs is its own cell's end: nothing is planned again."""
    cell, kept = plan("model=tiny", "gpu=cpu", device=CPU), tmp_path / "record.json"
    seen: list[Cell] = []

    class Told:
        tracking_error = ""

        def plain(self) -> dict[str, Any]:
            return {}

        def file(self, folder: Path) -> Path:
            return kept

        def begin(self, label: str) -> None: ...

        def done(self, record: Any) -> None: ...

    def run_cell(given: Cell, number: int, session: int, call: Any) -> Told:
        seen.append(given)
        return Told()

    told: Any = Told()
    monkeypatch.setattr(sweep, "_sweep", sweep.Sweep([cell], [sweep.Job([], cell, 0, 0)], "20260701-101010-abcd", 0))
    monkeypatch.setattr(sweep, "_running", sweep.Running(told, told))
    monkeypatch.setattr(sweep, "_planner", lambda: pytest.fail("planned again"))
    monkeypatch.setattr("registry.run.run_cell", run_cell)
    here = types.SimpleNamespace(job=types.SimpleNamespace(num=0))
    monkeypatch.setattr("hydra.core.hydra_config.HydraConfig.get", lambda: here)
    assert sweep.job(OmegaConf.create({})) == {"record": {}, "tracking_error": ""}
    assert seen == [cell]
    kept.touch()  # a record that is on disk is not kept in memory to the sweep's end
    assert sweep.job(OmegaConf.create({})) == {"file": str(kept), "tracking_error": ""}


def test_what_a_launcher_keeps_of_a_job_is_its_record_alone() -> None:
    """Hydra's own keeps what each job gave back to the end of the sweep, two configurations with it."""
    given = JobReturn(cfg=OmegaConf.create({"a": 1}), hydra_cfg=OmegaConf.create({"b": 2}))
    given.return_value = {"record": {}}
    sweep._callbacks().on_job_end(config=OmegaConf.create(), job_return=given)
    assert (given.cfg, given.hydra_cfg) == (None, None)
    given.status = JobStatus.COMPLETED
    assert given.return_value == {"record": {}}


def test_a_record_that_is_spoilt_while_its_sweep_goes_on_is_named_and_costs_no_other(tmp_path: Path) -> None:
    whole = made_up_record()
    spoilt = tmp_path / "spoilt.json"
    spoilt.touch()
    ended = [{"file": str(records.write(whole, tmp_path))}, {"file": str(spoilt)}, {"record": whole.plain()}]
    found, [problem] = sweep._records(ended)
    assert found == [whole, whole]
    assert problem.startswith(f"{spoilt}: ")


def test_what_fails_outside_every_cell_ends_the_call_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra would swallow the exception and run every cell again."""

    def fail(*_: Any) -> int:
        raise OSError("no space left")

    monkeypatch.setattr(sweep, "_sweep", sweep.Sweep([], [], "20260701-101010-abcd", 0))
    monkeypatch.setattr(sweep, "run", fail)
    with pytest.raises(SystemExit) as caught:
        sweep.SweepCallback().on_multirun_start(OmegaConf.create())
    assert caught.value.code == 1


def test_what_fails_where_nobody_can_be_told_ends_the_call_with_1_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("nobody reads this")

    monkeypatch.setattr(sweep, "_sweep", None)
    monkeypatch.setattr(sys, "stderr", Gone())
    with pytest.raises(SystemExit) as caught:
        sweep.SweepCallback().on_multirun_start(OmegaConf.create())
    assert caught.value.code == 1


def test_a_stream_that_fails_is_given_up() -> None:
    """Not the next piece either, nor what is held back and written as the process ends."""
    code = "from registry.streams import hide; hide(); print('lost', flush=True); print('lost too')"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stream_that_the_call_was_begun_without_is_none_that_fails() -> None:
    code = "from registry.streams import hide; hide(); print('lost', flush=True)"
    command = shlex.join([sys.executable, "-c", code])
    done = subprocess.run(f"{command} >&-", shell=True, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
