"""Quantised folders: written, read back, refused; and the cache in which those of random weights are kept."""

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backends.quant.exl2 import Exl2
from backends.quant.layouts import AwqLayout, GptqLayout
from registry import cli, synthesis
from registry.architecture import Architecture
from registry.cache import random_checkpoint
from registry.checkpoint import CheckpointFormat
from registry.compose import CONF
from registry.outcome import BadInput
from registry.schema import CacheConfig
from registry.synthesis import write_checkpoint
from registry.weights import FolderWeights, RandomWeights, check_folder

FORMS: dict[str, Any] = {
    "gptq": lambda: GptqLayout(GptqLayout.Options(group_size=32)),
    "awq": lambda: AwqLayout(AwqLayout.Options(group_size=32)),
    "exl2": lambda: Exl2(Exl2.Options()),
}


def quiet(_: str) -> None:
    pass


def nothing() -> None:
    pass


@pytest.fixture(scope="module")
def small(architecture: Architecture) -> Architecture:
    return dataclasses.replace(architecture, name="small", layers=2, vocab=64)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Any:
    return FORMS[request.param]()


@pytest.fixture
def folder(small: Architecture, form: CheckpointFormat, tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", small, RandomWeights(3), form, "cpu", quiet)
    return tmp_path / "model"


def test_a_folder_holds_what_its_layout_says(folder: Path, small: Architecture, form: Any) -> None:
    check_folder(folder, small, form)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == form.method
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["rope_theta"] == small.rope_theta


def test_how_a_folder_is_quantised_is_told(folder: Path, small: Architecture, form: Any) -> None:
    before = check_folder(folder, small, form)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["damp_percent"] = 0.1
    (folder / "config.json").write_text(json.dumps(config))
    assert check_folder(folder, small, form) != before


OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    "a window in each layer": ({"model_type": "mistral", "sliding_window": 4}, "sliding_window 4 (wanted none below"),
    "a window that is used": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4},
        "sliding_window 4 (wanted none below",
    ),
    "layers that attend to a window": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types ['full_attention', 'sliding_attention'] (wanted ['full_attention', 'full_attention'])",
    ),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act gelu (wanted silu)"),
    "half of a head turned": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 (wanted 1)"),
    "the same as transformers 5 writes it": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor 0.5 (wanted 1)",
    ),
}
ALIKE: dict[str, dict[str, Any]] = {
    "no window": {"model_type": "mistral", "sliding_window": None},
    "a window that is not used": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4},
    "a window of which nothing is told": {"model_type": "qwen2", "sliding_window": 4},
    "a window as long as the text": {"model_type": "mistral", "sliding_window": 1 << 20},
    "what is told in full": {
        "layer_types": ["full_attention"] * 2,
        "hidden_act": "silu",
        "partial_rotary_factor": 1.0,
    },
}


def with_config(folder: Path, small: Architecture, change: dict[str, Any]) -> Architecture:
    """A folder of `small`, whose config.json says something else; and what it is a model of."""
    shape = dataclasses.replace(small, model_type=change.get("model_type", small.model_type))
    write_checkpoint(folder, shape, RandomWeights(0), FORMS["gptq"](), "cpu", quiet)
    config = json.loads((folder / "config.json").read_text())
    unsaid = ("sliding_window", "use_sliding_window", "layer_types")
    config = {key: value for key, value in config.items() if key not in unsaid} | change
    (folder / "config.json").write_text(json.dumps(config))
    return shape


@pytest.mark.parametrize("what", OTHERWISE)
def test_a_folder_whose_shapes_fit_and_whose_model_computes_otherwise_is_refused(
    small: Architecture, tmp_path: Path, what: str
) -> None:
    change, told = OTHERWISE[what]
    shape = with_config(tmp_path / "model", small, change)
    with pytest.raises(BadInput, match="holds another architecture") as caught:
        check_folder(tmp_path / "model", shape, FORMS["gptq"]())
    assert told in str(caught.value)


@pytest.mark.parametrize("what", ALIKE)
def test_a_folder_that_only_says_so_otherwise_is_taken(small: Architecture, tmp_path: Path, what: str) -> None:
    shape = with_config(tmp_path / "model", small, ALIKE[what])
    check_folder(tmp_path / "model", shape, FORMS["gptq"]())


def test_a_scaled_rotary_embedding_is_told_as_old_and_new_readers_want_it(
    small: Architecture, tmp_path: Path
) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    scaled = dataclasses.replace(small, rope_scaling=scaling)
    write_checkpoint(tmp_path / "model", scaled, RandomWeights(0), FORMS["exl2"](), "cpu", quiet)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["rope_scaling"] == scaling
    assert config["rope_parameters"] == scaling | {"rope_theta": small.rope_theta}
    check_folder(tmp_path / "model", scaled, FORMS["exl2"]())


def test_an_exl2_folder_may_hold_a_stale_index_and_the_head_of_a_tied_model(
    small: Architecture, tmp_path: Path
) -> None:
    """As ExLlamaV2's own converter leaves them."""
    write_checkpoint(tmp_path / "model", small, RandomWeights(0), FORMS["exl2"](), "cpu", quiet)
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1-of-9.safetensors"}}'
    )
    check_folder(tmp_path / "model", dataclasses.replace(small, tied_embeddings=True), FORMS["exl2"]())


def test_a_folder_decodes_to_the_weights_it_was_made_of(folder: Path, small: Architecture, form: Any) -> None:
    source, random = FolderWeights(folder), RandomWeights(3)
    for name, (wide, tall) in small.linear_shapes.items():
        layer = f"model.layers.1.{name}"
        decoded = form.decode(source.quantised(layer, "cpu"))
        original = random.tensor(f"{layer}.weight", (tall, wide), torch.float32, "cpu")
        assert torch.nn.functional.cosine_similarity(decoded.flatten(), original.flatten(), dim=0) > 0.98
    bias = source.tensor("model.layers.1.self_attn.q_proj.bias", (small.hidden,), torch.float32, "cpu")
    assert torch.allclose(
        bias, random.tensor("model.layers.1.self_attn.q_proj.bias", (small.hidden,), torch.float32, "cpu"), atol=0.01
    )


def test_large_folders_have_shards_and_an_index(
    small: Architecture, form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesis, "SHARD_BYTES", 40_000)
    write_checkpoint(tmp_path / "model", small, RandomWeights(0), form, "cpu", quiet)
    assert len(list((tmp_path / "model").glob("model-0*.safetensors"))) > 2
    check_folder(tmp_path / "model", small, form)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_exists_is_left_alone(folder: Path, small: Architecture, form: Any) -> None:
    before = (folder / "config.json").stat().st_mtime_ns
    with pytest.raises(BadInput, match="exists already"):
        write_checkpoint(folder, small, RandomWeights(0), form, "cpu", quiet)
    assert (folder / "config.json").stat().st_mtime_ns == before


def test_a_failure_leaves_nothing(small: Architecture, form: Any, tmp_path: Path) -> None:
    def fail(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "model", small, RandomWeights(0), form, "cpu", fail)
    assert list(tmp_path.iterdir()) == []


# What is refused before anything starts


@pytest.mark.parametrize("other", FORMS)
def test_a_folder_of_one_format_is_refused_to_another(
    folder: Path, small: Architecture, form: Any, other: str
) -> None:
    if FORMS[other]().method == form.method:
        return
    with pytest.raises(BadInput, match=f"quantised as {form.method}; this quant reads {other} ones"):
        check_folder(folder, small, FORMS[other]())


def test_a_quantised_folder_is_refused_to_what_reads_none(folder: Path, small: Architecture) -> None:
    with pytest.raises(BadInput, match="this quant reads unquantised ones"):
        check_folder(folder, small, None)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_other_widths_are_refused(small: Architecture, tmp_path: Path, name: str, bits: int) -> None:
    write_checkpoint(tmp_path / "model", small, RandomWeights(0), FORMS[name](), "cpu", quiet)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"]["bits"] = bits
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=f"the folder's weights have {bits} bits"):
        check_folder(tmp_path / "model", small, FORMS[name]())


def test_a_missing_part_of_a_layer_is_refused(folder: Path, small: Architecture, form: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if "down_proj" in name and "scale" in name)
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadInput, match=f"lacks the tensor {gone}"):
        check_folder(folder, small, form)


def test_words_of_another_shape_are_refused(folder: Path, small: Architecture, form: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "down_proj" in name and name.endswith("weight"))
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BadInput, match="has shape"):
        check_folder(folder, small, form)


# The cache


def kept(config: CacheConfig, architecture: Architecture, seed: int, form: Any) -> Path:
    """A folder of the cache, no longer held."""
    with random_checkpoint(config, architecture, seed, form, "cpu", nothing, quiet) as folder:
        return folder


def limited(folder: Path, small: Architecture, folders: float) -> CacheConfig:
    """A cache with room for so many folders beside a new one."""
    size = sum(file.stat().st_size for file in folder.iterdir())
    return CacheConfig(str(folder.parent.parent), limit_gb=(folders * size + small.parameters) / 1e9)


def test_a_random_folder_is_written_once(small: Architecture, form: Any, tmp_path: Path) -> None:
    told: list[str] = []
    config = CacheConfig(str(tmp_path))
    with random_checkpoint(config, small, 0, form, "cpu", nothing, told.append) as first:
        assert told == ["block 1 of 2", "block 2 of 2"]
        with random_checkpoint(config, small, 0, form, "cpu", nothing, told.append) as again:
            assert again == first
        assert len(told) == 2
        with random_checkpoint(config, small, 1, form, "cpu", nothing, told.append) as other:
            assert other != first
    assert len(told) == 4


def test_the_longest_unused_folder_makes_room(small: Architecture, tmp_path: Path) -> None:
    form = FORMS["gptq"]()
    folders = [kept(CacheConfig(str(tmp_path)), small, seed, form) for seed in range(3)]
    for age, folder in enumerate(folders):
        os.utime(folder, (1000 + age, 1000 + age))
    fourth = kept(limited(folders[0], small, 2.5), small, 3, form)
    left = {folder for folder in (tmp_path / "checkpoints").iterdir() if folder.is_dir()}
    assert folders[0] not in left
    assert {folders[2], fourth} <= left


def test_a_folder_in_use_is_never_removed(small: Architecture, tmp_path: Path) -> None:
    form = FORMS["gptq"]()
    with random_checkpoint(CacheConfig(str(tmp_path)), small, 0, form, "cpu", nothing, quiet) as first:
        kept(CacheConfig(str(tmp_path), limit_gb=1e-9), small, 1, form)
        assert first.is_dir()
    kept(CacheConfig(str(tmp_path), limit_gb=1e-9), small, 2, form)
    assert not first.exists()


def test_what_is_being_written_is_left_alone_and_what_a_killed_process_left_is_not(
    small: Architecture, tmp_path: Path
) -> None:
    form = FORMS["gptq"]()
    first = kept(CacheConfig(str(tmp_path)), small, 0, form)
    abandoned, written = first.with_name(f".{first.name}.0badf00d"), first.with_name(".other.12345678")
    for folder in (abandoned, written):
        folder.mkdir()
        (folder / "0.safetensors").touch()
    with first.with_name("other.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept(CacheConfig(str(tmp_path)), small, 1, form)
    assert first.is_dir()
    assert written.is_dir()
    assert not abandoned.exists()


PARALLEL = """
import sys
from pathlib import Path
from backends.quant.layouts import GptqLayout
from registry.architecture import Architecture
from registry.cache import random_checkpoint
from registry.compose import Composer
from registry.plugins import Catalog
from registry.schema import CacheConfig
tiny = Architecture.of(Composer(Catalog()).cell(["model=tiny"]).model)
form = GptqLayout(GptqLayout.Options(group_size=32))
for turn in range(6):
    with random_checkpoint(CacheConfig(sys.argv[1], 1e-9), tiny, turn % 3, form, "cpu", list, str) as folder:
        assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
"""
"""Writes, uses and throws out folders; beside others that do the same no folder is ever taken half written."""


def test_processes_share_a_cache(tmp_path: Path) -> None:
    call = [sys.executable, "-c", PARALLEL, tmp_path]
    others = [subprocess.Popen(call, stderr=subprocess.PIPE, text=True, cwd=CONF.parent) for _ in range(3)]
    told = [other.communicate(timeout=200)[1] for other in others]
    assert [other.returncode for other in others] == [0, 0, 0], told
    assert not [folder for folder in (tmp_path / "checkpoints").iterdir() if folder.name.startswith(".")]


# The command


def test_rfloor_synthesize(tmp_path: Path, capsys: pytest.CaptureFixture[str], architecture: Architecture) -> None:
    out = tmp_path / "made"
    call = ["synthesize", "model=tiny", "quant=exl2", "quant.options.bpw=3", f"out={out}"]
    assert cli.main(call) == 0
    assert f"model.weights={out} quant=exl2 model=tiny" in capsys.readouterr().out
    check_folder(out, architecture, FORMS["exl2"]())
    assert cli.main(call) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["model=tiny", "quant=gptq"], "out=DIR"),
        (["model=tiny", "quant=none", "out=x"], "quant=none is no format that folders are written in"),
        (["model=tiny", "quant=gptq", "quant.options.group_size=100", "out=x"], "group_size=100: Known: 128, 32, 64"),
        (["model=tiny", "quant=exl2", "quant.options.bpw=1", "out=x"], "quant.options.bpw=1"),
        (["model=tinny", "quant=gptq", "out=x"], "did you mean tiny?"),
        (["model=tiny", "quant=gptq", "quant.options.kernel=marlyn", "out=x"], "did you mean marlin?"),
        (["model=tiny", "quant=gptq", "out=/dev/null/x"], "out=/dev/null/x cannot be written"),
        (["model=tiny", "quant=awq", "model.ffn=384", "model.hidden=144", "out=x"], "does not divide the 144 input"),
    ],
)
def test_rfloor_synthesize_refuses(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["synthesize", *arguments]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
