"""Cells of the quantisation runtimes: as they are planned anywhere, and as they run on a machine without CUDA."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planning import CPU, H200, Plan, refused
from safetensors.torch import load_file, save_file
from sweeps import Start, Sweep, words

from backends.attention.sdpa import Sdpa
from backends.hf import HfBackend
from backends.legacy import LegacyBackend
from backends.quant.awq import Awq
from backends.quant.gptq import Gptq
from registry.api import Setup
from registry.architecture import Architecture
from registry.environments import interpreter
from registry.fidelity import compare
from registry.outcome import BadInput, Outcome
from registry.synthesis import write_checkpoint
from registry.weights import FolderWeights, RandomWeights, check_folder

pytest.importorskip("gptqmodel")

# sqlalchemy about what MLflow does
pytestmark = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated")


# Planned

REFUSED: dict[str, tuple[list[str], str, str]] = {
    "a kernel that no graph captures": (
        ["quant=gptq-exllamav2", "execution=cuda_graph"],
        "launches its exllamav2 kernel on CUDA's default stream, which no graph captures",
        "Use execution=eager",
    ),
    "a kernel that torch.compile cannot follow": (
        ["quant=gptq-exllamav2", "execution=compile"],
        "exllamav2 kernel hangs on a handle that torch.compile cannot follow",
        "Use execution=eager",
    ),
    "a compilation of a runtime with a body of its own": (
        ["quant=exl2", "execution=compile"],
        "'exllamav2' cannot be launched by execution=compile",
        "Use execution=eager",
    ),
    "a compilation under an old transformers": (
        ["quant=autoawq", "execution=compile"],
        "'autoawq' cannot be launched by execution=compile",
        "Use execution=eager or execution=cuda_graph",
    ),
    "a kernel that gives NaNs": (["quant=awq-gemv"], "gives NaNs for more than 8 rows", "marlin or gemm"),
    "a graph of a runtime whose cache is on the host": (
        ["quant=exl2", "execution=cuda_graph"],
        "'exllamav2' cannot be launched by execution=cuda_graph",
        "Use execution=eager",
    ),
    "a format in another's body": (
        ["quant=exl2", "backend=hf"],
        "quant=exl2 is the storage of a runtime with a body of its own, and backend=hf does not read it",
        "Use backend=auto",
    ),
    "a format that the body does not read": (
        ["quant=awq", "backend=exllamav2"],
        "backend=exllamav2 does not host quant=awq",
        "It hosts exl2, gptq",
    ),
    "a kernel that the body does not call": (
        ["quant=gptq-marlin", "backend=exllamav2"],
        "ExLlamaV2 multiplies by its own kernel, and quant.options.kernel=marlin asks for another",
        "Use quant=gptq, or backend=hf",
    ),
    "an attention that the body does not call": (
        ["quant=autoawq", "attention=sdpa-math"],
        "autoawq attends as transformers 4.51 does, and attention.options.kernel=math asks for another way",
        "Use attention=sdpa",
    ),
    "a kernel that a legacy package does not have": (
        ["quant=autoawq", "backend=autoawq", "backend.options.kernel=torch"],
        "autoawq has no torch kernel on the cuda",
        "Use backend.options.kernel=triton",
    ),
    "rows that do not fill the kernel's tile": (
        ["quant=awq-gemm", "model.ffn=4896", "model.hidden=896", "quant.options.group_size=32"],
        "AwqGEMMLinear takes output features in multiples of 64; mlp.gate_proj of qwen2.5-0.5b has 4896",
        "Use another quant.options.kernel",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_run_together_is_told_before_loading(plan: Plan, why: str) -> None:
    overrides, reason, remedy = REFUSED[why]
    refusal = refused(plan(*overrides), Outcome.UNSUPPORTED)
    assert reason in refusal.reason
    assert remedy in refusal.remedy


@pytest.mark.parametrize(
    ("quant", "reason"),
    [
        ("exl2", "'exllamav2' runs on cuda, this device is cpu"),
        ("gptq-marlin", "gptqmodel's marlin kernel runs on cuda, this device is the cpu"),
        ("awq-gemm", "gptqmodel's gemm kernel runs on cuda, this device is the cpu"),
    ],
)
def test_what_needs_cuda_is_told_on_a_cpu(plan: Plan, quant: str, reason: str) -> None:
    assert reason in refused(plan(f"quant={quant}", device=CPU), Outcome.UNSUPPORTED).reason


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["quant=gptq", "quant.options.kernel=marlyn"], "kernel=marlyn: did you mean marlin"),
        (["quant=awq", "quant.options.group_size=100"], "group_size=100: Known: 128, 32, 64"),
        (["quant=autoawq", "quant.options.group_size=100"], "group_size=100: Known: 128, 32, 64"),
        (["quant=gptq", "model.ffn=4800"], "group_size=128 does not divide the 4800 input features of mlp.down_proj"),
        (["quant=exl2", "quant.options.bpw=9"], "quant.options.bpw=9"),
        (["quant=exl2", "model.ffn=4808"], "EXL2 packs 32 features together"),
        (["quant=fp4", "quant.options.levels=fp5"], "levels=fp5: did you mean fp4"),
        (["quant=auto-gptq", "backend=auto-gptq", "backend.options.kernel=fast"], "backend.options.kernel=fast"),
    ],
)
@pytest.mark.parametrize("device", [H200, CPU], ids=["cuda", "cpu"])
def test_an_option_that_means_nothing_is_bad_input(plan: Plan, overrides: list[str], told: str, device: Any) -> None:
    if device is CPU and "exl2" in overrides[0]:
        pytest.skip("refused for its device first")
    with pytest.raises(BadInput, match=told):
        plan(*overrides, device=device)


def test_the_users_own_command_is_three_runtimes(plan: Plan) -> None:
    cells = [plan("model=qwen2.5-7b", "protocol=paper", f"quant={quant}") for quant in ("exl2", "awq", "nf4")]
    assert [cell.config.backend.name for cell in cells] == ["exllamav2", "hf", "hf"]
    refusals = [cell.refusal.reason for cell in cells if cell.refusal]
    assert refusals in ([], ["exllamav2 is not installed"])


def test_a_body_with_kernels_of_its_own_needs_no_other_s_package(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"exllamav2": "0.3.2"}
    monkeypatch.setattr("registry.plan.version", lambda package, _: there.get(package))
    assert plan("quant=gptq", "backend=exllamav2").refusal is None
    assert refused(plan("quant=gptq"), Outcome.MISSING_DEPENDENCY).reason == "gptqmodel is not installed"


def test_a_folder_s_group_size_is_the_cell_s(plan: Plan, architecture: Architecture, tmp_path: Path) -> None:
    narrow = replace(architecture, ffn=288)
    form = Gptq(Gptq.Options(group_size=32))
    write_checkpoint(tmp_path / "model", narrow, RandomWeights(0), form, "cpu", lambda _: None)
    cell = plan("model=tiny", "model.ffn=288", "quant=gptq", f"model.weights={tmp_path / 'model'}", device=CPU)
    assert cell.refusal is None
    assert cell.config.quant.options["group_size"] == 32


@pytest.mark.parametrize("quant", ["autoawq", "auto-gptq"])
def test_a_missing_environment_is_told_with_the_command_that_makes_it(
    plan: Plan, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LegacyBackend, "environment", "no-such-folder")
    cell = plan(f"quant={quant}", f"backend={quant}")
    refusal = refused(cell, Outcome.MISSING_DEPENDENCY)
    assert f"backend={quant} runs in an environment of its own, and no-such-folder is none" in refusal.reason
    assert refusal.remedy == "make legacy"


# Measured

NO_LEGACY = not interpreter(".legacy").exists()


@pytest.fixture(scope="module")
def measured(start: Start) -> Sweep:
    return start("quant=gptq,awq,nf4,nf4-double,fp4,exl2", "context=16").end()


@pytest.mark.parametrize("quant", ["gptq", "awq", "nf4", "nf4-double", "fp4"])
def test_a_runtime_runs_on_the_cpu(measured: Sweep, quant: str) -> None:
    [record] = [record for record in measured.records() if record["config"]["quant"]["name"] == quant]
    assert record["outcome"] == "ok", record["reason"]
    assert record["metrics"]["logit_cosine"] > 0.999
    assert record["metrics"]["streamed_bytes"] < record["metrics"]["weight_bytes"] * 2
    assert record["measured"]["kernels"]
    kernels = measured.runs()[record["record_id"]].data.tags["kernels"]
    assert " x" in kernels


def test_what_needs_cuda_is_a_row(measured: Sweep) -> None:
    assert measured.code == 0, measured.stderr
    record = measured.records()[-1]
    assert (record["outcome"], record["config"]["backend"]["name"]) == ("unsupported", "exllamav2")


def test_synthetic_folders_are_told_and_kept(measured: Sweep) -> None:
    assert measured.stderr.count("synthesize gptq weights") == 1
    kept = measured.folder / "cache" / "checkpoints"
    assert {folder.name.rpartition("-")[0] for folder in kept.iterdir() if folder.is_dir()} >= {
        "tiny-gptq",
        "tiny-awq",
    }


@pytest.mark.skipif(NO_LEGACY, reason="make legacy")
def test_abandoned_packages_run_in_their_own_environment(start: Start) -> None:
    sweep = start("quant=autoawq,auto-gptq", "context=16").end()
    assert sweep.code == 0, sweep.stderr
    for record, package in zip(sweep.records(), ("autoawq", "auto-gptq"), strict=True):
        assert record["outcome"] == "ok", record["reason"]
        versions = record["environment"]["versions"]
        assert package in versions
        assert versions["transformers"].startswith("4.51.")
        assert record["metrics"]["logit_cosine"] > 0.999
        tags = sweep.runs()[record["record_id"]].data.tags
        assert (tags["upstream"], tags["version.transformers"]) == ("abandoned", versions["transformers"])


# Damaged folders

Damage = Callable[[Path], None]


@pytest.fixture
def folder(architecture: Architecture, tmp_path: Path) -> Path:
    form = Gptq(Gptq.Options())
    write_checkpoint(tmp_path / "model", architecture, RandomWeights(0), form, "cpu", lambda _: None)
    return tmp_path / "model"


def with_infinite_scales(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"][0, 3] = float("inf")
    save_file(tensors, folder / "model.safetensors")


def test_scales_that_are_infinite_are_one_cell_s_end(start: Start, folder: Path) -> None:
    """What only the numbers tell is told when they are read; the cell beside it is measured."""
    with_infinite_scales(folder)
    sweep = start("quant=gptq", f"model.weights={folder},random", "context=16").end()
    assert sweep.code == 0, sweep.stderr
    bad, good = sweep.records()
    assert (bad["outcome"], good["outcome"]) == ("unsupported", "ok")
    assert bad["reason"] == "the checkpoint is damaged: a scale is infinite or no number"


def edited(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))


DAMAGES: dict[str, tuple[Damage, list[str], str]] = {
    "another format": (lambda _: None, ["quant=awq"], "quantised as gptq; this quant reads awq ones"),
    "no format": (lambda _: None, ["quant=nf4"], "quantised as gptq; this quant reads unquantised ones"),
    "three bits": (lambda f: edited(f, bits=3), ["quant=gptq"], "the folder's weights have 3 bits"),
    "eight bits": (lambda f: edited(f, bits=8), ["quant=gptq"], "the folder's weights have 8 bits"),
    "asymmetric for Marlin": (
        lambda f: edited(f, sym=False),
        ["quant=gptq-marlin"],
        "asymmetric, and gptqmodel's Marlin multiplies symmetric GPTQ",
    ),
    "a float group size": (lambda f: edited(f, group_size=64.0), ["quant=gptq"], "the folder's group size is 64.0"),
    "group size": (lambda f: edited(f, group_size=96), ["quant=gptq"], "the folder's group size is 96"),
    "truncated": (
        lambda f: os.truncate(f / "model.safetensors", 5000),
        ["quant=gptq"],
        "model.safetensors is truncated",
    ),
    "a shard missing": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}') and None,
        ["quant=gptq"],
        "lacks b.safetensors",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_headers_tell_is_bad_input(plan: Plan, folder: Path, damage: str) -> None:
    break_it, overrides, told = DAMAGES[damage]
    break_it(folder)
    with pytest.raises(BadInput, match=told):
        plan("model=tiny", *overrides, f"model.weights={folder}", device=CPU)


def test_a_bad_folder_in_one_cell_refuses_the_whole_call(start: Start, folder: Path) -> None:
    edited(folder, bits=3)
    sweep = start("quant=gptq", f"model.weights=random,{folder}").end()
    assert sweep.code == 2, sweep.stderr
    assert "the folder's weights have 3 bits, rfloor's gptq kernels multiply 4" in words(sweep.stderr)
    assert "Traceback" not in sweep.stderr
    assert not (sweep.folder / "records").exists()


@pytest.mark.parametrize("quant", ["exl2", "autoawq"])
def test_an_unquantised_folder_is_refused_to_what_reads_quantised_ones(
    plan: Plan, architecture: Architecture, tmp_path: Path, quant: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(architecture.transformers_config()).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="holds unquantised weights, and this quant reads folders"):
        plan("model=tiny", f"quant={quant}", f"model.weights={tmp_path}")
    assert plan("model=tiny", "quant=gptq", f"model.weights={tmp_path}", device=CPU).refusal is None


@pytest.mark.parametrize("plugin", [Gptq, Awq])
def test_a_folder_s_own_group_size_is_taken(plugin: Any, architecture: Architecture, tmp_path: Path) -> None:
    """A folder in groups of 32, read where the configuration says 128, decodes as transformers does."""
    written = plugin(plugin.Options(group_size=32))
    write_checkpoint(tmp_path / "model", architecture, RandomWeights(0), written, "cpu", lambda _: None)
    form = plugin(plugin.Options(group_size=128))
    check_folder(tmp_path / "model", architecture, form)
    assert form.group_size == 32
    setup = Setup(
        architecture=architecture,
        weights=FolderWeights(tmp_path / "model"),
        device="cpu",
        dtype=torch.bfloat16,
        batch_size=1,
        cache="dynamic",
        linear=form,
        attention=Sdpa(Sdpa.Options()),
        options=HfBackend.Options(),
    )
    with torch.inference_mode():
        assert compare(HfBackend(setup), seed=0).logit_cosine > 0.999
