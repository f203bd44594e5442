"""Weights from a seed, a folder or the hub's cache; and what is refused before anything starts."""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from registry.architecture import Architecture
from registry.checkpoint import expected_tensors
from registry.compose import Composer
from registry.outcome import BadInput, Outcome, Refused
from registry.plugins import Catalog
from registry.weights import FolderWeights, RandomWeights, check_biases, check_weights, hub_commit, open_weights

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "qkv_bias": True},
    "qwen2-tied": {"model_type": "qwen2", "qkv_bias": True, "tied_embeddings": True},
    "llama": {"model_type": "llama", "qkv_bias": False},
    "llama-scaled": {"model_type": "llama", "qkv_bias": False, "rope_scaling": LLAMA3},
    "mistral": {"model_type": "mistral", "qkv_bias": False},
}


def build(architecture: Architecture) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(architecture.transformers_config())


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, architecture: Architecture) -> Architecture:
    return dataclasses.replace(architecture, **VARIANTS[request.param])


@pytest.fixture(scope="module")
def small(architecture: Architecture) -> Architecture:
    return dataclasses.replace(architecture, name="small", layers=1, vocab=32, ffn=32)


@pytest.fixture(scope="module")
def saved(small: Architecture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good folder; never changed."""
    folder = tmp_path_factory.mktemp("saved")
    build(small).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A good folder of one's own."""
    return shutil.copytree(saved, tmp_path / "model")


# Names and shapes


def test_expected_tensors_are_those_of_transformers(variant: Architecture) -> None:
    with torch.device("meta"):
        state = build(variant).state_dict()
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if variant.tied_embeddings:
        assert found.pop("lm_head.weight") == found["model.embed_tokens.weight"]
    assert expected_tensors(variant) == found


@pytest.mark.parametrize("model", Composer(Catalog()).options("model"))
def test_expected_tensors_add_up_to_the_parameters(composer: Composer, model: str) -> None:
    a = Architecture.of(composer.cell([f"model={model}"]).model)
    assert sum(math.prod(shape) for shape in expected_tensors(a).values()) == a.parameters


# Folders that are fine


@pytest.mark.parametrize("shard", ["1GB", "300KB"], ids=["one file", "shards"])
def test_a_saved_model_is_accepted_and_gives_its_very_tensors(
    variant: Architecture, tmp_path: Path, shard: str
) -> None:
    model = build(variant)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "300KB")
    check_weights(str(tmp_path), variant)
    source = open_weights(str(tmp_path), None, seed=0)
    assert isinstance(source, FolderWeights)
    state = model.state_dict()
    for name, shape in expected_tensors(variant).items():
        assert torch.equal(source.tensor(name, shape, torch.float32, "cpu"), state[name])


def test_a_tensor_comes_in_the_dtype_that_is_asked_for(saved: Path, small: Architecture) -> None:
    stored = load_file(saved / "model.safetensors")["model.norm.weight"]
    found = FolderWeights(saved).tensor("model.norm.weight", (small.hidden,), torch.bfloat16, "cpu")
    assert torch.equal(found, stored.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [("model.nom.weight", (128,), "no tensor called model.nom.weight"), ("model.norm.weight", (7,), "(7,)")],
)
def test_a_tensor_that_is_not_there_is_refused(saved: Path, name: str, shape: tuple[int], told: str) -> None:
    with pytest.raises(Refused) as caught:
        FolderWeights(saved).tensor(name, shape, torch.float32, "cpu")
    assert caught.value.refusal.outcome is Outcome.UNSUPPORTED
    assert told in caught.value.refusal.reason


def test_a_tilde_is_the_home_folder(folder: Path, small: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    check_weights("~/model", small)
    assert isinstance(open_weights("~/model", None, seed=0), FolderWeights)


def test_a_config_of_transformers_4_is_understood(folder: Path, small: Architecture) -> None:
    """There `rope_theta` stood at the top level, and the scaling under `rope_scaling`."""
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": small.rope_theta, "rope_scaling": LLAMA3}
    (folder / "config.json").write_text(json.dumps(config))
    scaled = dataclasses.replace(small, rope_scaling=LLAMA3)
    check_weights(str(folder), scaled)
    with pytest.raises(BadInput, match="rope_scaling"):
        check_weights(str(folder), small)
    older = {"type" if name == "rope_type" else name: value for name, value in LLAMA3.items()}
    edit(folder / "config.json", rope_scaling=older)
    check_weights(str(folder), scaled)
    assert dataclasses.replace(small, rope_scaling=older) == scaled
    assert (small.rope_type, scaled.rope_type) == ("default", "llama3")


# Folders that are refused


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def traverse(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "x.safetensors")
    index(folder, {"lm_head.weight": "../x.safetensors"})


NORM = "model.norm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config no JSON": (lambda f: truncate(f / "config.json", 9), "config.json cannot be read"),
    "config too deep": (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json cannot be read"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json cannot be read"),
    "config no object": (lambda f: (f / "config.json").write_text("[1]"), "config.json holds no JSON object"),
    "another type": (
        lambda f: edit(f / "config.json", model_type="llama"),
        "model_type llama (wanted qwen2)",
    ),
    "another size": (
        lambda f: edit(f / "config.json", num_hidden_layers=2, hidden_size=64),
        "architecture than small: layers 2 (wanted 1), hidden 64 (wanted 128)",
    ),
    "another epsilon": (
        lambda f: edit(f / "config.json", rms_norm_eps=1e-5),
        "rms_norm_eps 1e-05 (wanted 1e-06)",
    ),
    "tied": (
        lambda f: edit(f / "config.json", tie_word_embeddings=True),
        "tied_embeddings True (wanted False)",
    ),
    "another base": (
        lambda f: edit(f / "config.json", rope_parameters={"rope_theta": 5.0}),
        "rope_theta 5.0 (wanted 10000.0)",
    ),
    "another scaling": (
        lambda f: edit(f / "config.json", rope_parameters={"rope_theta": 10000.0, **LLAMA3}),
        "rope_scaling {'rope_type': 'llama3'",
    ),
    "strange rope": (lambda f: edit(f / "config.json", rope_parameters=[1]), "rope_theta None"),
    "quantised": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq"}),
        "quantised as gptq; this quant reads unquantised ones",
    ),
    "quantised strangely": (lambda f: edit(f / "config.json", quantization_config="awq"), "quantised as awq"),
    "only pickles": (only_pickles, "holds no *.safetensors file"),
    "empty file": (lambda f: truncate(f / "model.safetensors", 0), "model.safetensors is truncated"),
    "cut prefix": (lambda f: truncate(f / "model.safetensors", 5), "model.safetensors is truncated"),
    "cut header": (lambda f: truncate(f / "model.safetensors", 100), "model.safetensors is truncated"),
    "cut by a byte": (lambda f: truncate(f / "model.safetensors", -1), "model.safetensors is truncated"),
    "no tensor file": (lambda f: (f / "model.safetensors").write_text("x" * 99), "or no safetensors file"),
    "missing tensor": (lambda f: change_tensors(f, lambda t: t.pop(NORM)), f"lacks the tensor {NORM}"),
    "strange tensor": (
        lambda f: change_tensors(f, lambda t: t.update({"model.layers.0.x.bias": t[NORM].clone()})),
        "holds model.layers.0.x.bias, for which small has no place",
    ),
    "integers": (
        lambda f: change_tensors(f, lambda t: t.update({NORM: t[NORM].to(torch.int8)})),
        f"{NORM} is stored as I8",
    ),
    "wrong shape": (
        lambda f: change_tensors(f, lambda t: t.update({NORM: t[NORM][:-1].clone()})),
        f"{NORM} has shape (127,), small wants (128,)",
    ),
    "missing shard": (
        lambda f: index(f, {NORM: "model.safetensors", "lm_head.weight": "gone.safetensors"}),
        "lacks gone.safetensors, which model.safetensors.index.json lists",
    ),
    "traversal": (traverse, "index.json does not list files of its own folder"),
    "absolute path": (lambda f: index(f, {NORM: str(f / "model.safetensors")}), "files of its own folder"),
    "parent as shard": (lambda f: index(f, {NORM: ".."}), "lacks .."),
    "lists as shards": (lambda f: index(f, {NORM: ["model.safetensors"]}), "files of its own folder"),
    "no shards": (lambda f: index(f, {}), "files of its own folder"),
    "index no map": (lambda f: index(f, ["model.safetensors"]), "files of its own folder"),
    "index no JSON": (
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        "index.json cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_bad_input_with_file_and_cause(folder: Path, small: Architecture, damage: str) -> None:
    check_weights(str(folder), small)
    harm, told = DAMAGES[damage]
    harm(folder)
    with pytest.raises(BadInput) as caught:
        check_weights(str(folder), small)
    assert told in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "weights",
    [
        "gone",
        "models/tinny",
        "./models/gone",
        "models/tiny/model.safetensors",
        "/gone/model",
        "a/b/c",
        "../a/b",
        "Qwen/",
        "https://huggingface.co/Qwen/Qwen2.5-7B",
        "Qwen/Qwen2.5-7B\n",
        "-a/b",
        "Random",
        "~nobody-has-this-name/model",
        "x" * 300,
        "\0",
    ],
)
def test_what_is_neither_folder_nor_hub_id_is_bad_input(
    weights: str, saved: Path, small: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`models/tinny` beside a folder `models/tiny` is a typing error, though it has the form of a hub id."""
    shutil.copytree(saved, tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    check_weights("models/tiny", small)
    with pytest.raises(BadInput) as caught:
        check_weights(weights, small)
    assert f"model.weights={weights}: no such folder" in str(caught.value)


def test_a_folder_is_told_by_its_headers_and_a_sample_of_its_values_and_not_by_its_place(
    folder: Path, saved: Path, small: Architecture
) -> None:
    """Other values of the same shapes take the same time, and are another model with other logits."""
    before = check_weights(str(folder), small)
    assert before == check_weights(str(saved), small)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, folder / "model.safetensors")
    other = check_weights(str(folder), small)
    assert other["headers"] == before["headers"]
    assert other != before
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert check_weights(str(folder), small) != before
    shutil.copy(saved / "model.safetensors", folder)
    assert check_weights(str(folder), small) == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "5.0"}))
    assert check_weights(str(folder), small) == before
    assert check_weights("random", small) == check_weights("owner/name", small) == {}


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def victim(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(saved, tmp_path_factory.mktemp("victim") / "model")


def check_then_load(folder: Path, architecture: Architecture) -> None:
    """What is not refused has to load."""
    with contextlib.suppress(BadInput):
        check_weights(str(folder), architecture)
        source = FolderWeights(folder)
        for name, shape in expected_tensors(architecture).items():
            source.tensor(name, shape, torch.bfloat16, "cpu")


@settings(max_examples=200)
@given(data=st.data())
def test_a_damaged_header_is_bad_input_or_harmless(
    victim: Path, saved: Path, small: Architecture, data: st.DataObject
) -> None:
    whole = (saved / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header: dict[str, Any] = json.loads(whole[8:start])
    kind = data.draw(st.sampled_from(["bytes", "byte", "entry", "field", "length"]))
    if kind == "bytes":
        damaged = data.draw(st.binary(max_size=64))
    elif kind == "byte":
        position = data.draw(st.integers(0, start - 1))
        damaged = whole[:position] + data.draw(st.binary(max_size=2)) + whole[position + 1 :]
    elif kind == "length":
        damaged = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little") + whole[8:]
    else:
        name = data.draw(st.sampled_from([*sorted(header.keys() - {"__metadata__"}), "__metadata__", "new"]))
        value = data.draw(JSON_VALUES)
        if kind == "field" and name in header:
            field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "new"]))
            header[name] = header[name] | {field: value}
        else:
            header[name] = value
        text = json.dumps(header).encode()
        damaged = len(text).to_bytes(8, "little") + text + whole[start:]
    (victim / "model.safetensors").write_bytes(damaged)
    (victim / "config.json").write_bytes((saved / "config.json").read_bytes())
    check_then_load(victim, small)


@settings(max_examples=100)
@given(
    key=st.sampled_from(["rope_parameters", "rope_scaling", "quantization_config", "model_type", "new"]),
    value=JSON_VALUES,
)
def test_a_strange_config_is_bad_input_or_harmless(
    victim: Path, saved: Path, small: Architecture, key: str, value: object
) -> None:
    config = json.loads((saved / "config.json").read_text()) | {key: value}
    (victim / "config.json").write_text(json.dumps(config))
    (victim / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    check_then_load(victim, small)


# The hub


@pytest.mark.parametrize("weights", ["Qwen/Qwen2.5-7B-Instruct", "a/b", "meta-llama/Llama-3.1-8B", "x_1/y.z"])
def test_the_form_of_a_hub_id_is_enough_beforehand(
    weights: str, small: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_weights(weights, small)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, which may not use the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.mark.parametrize("revision", [None, "main", "1" * 40])
def test_a_cached_hub_model_is_found_without_network(
    hub_cache: Path, saved: Path, small: Architecture, revision: str | None
) -> None:
    repository = hub_cache / "models--owner--name"
    shutil.copytree(saved, repository / "snapshots" / ("1" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    source = open_weights("owner/name", revision, seed=0)
    expected = load_file(saved / "model.safetensors")[NORM]
    assert torch.equal(source.tensor(NORM, (small.hidden,), torch.float32, "cpu"), expected)


@pytest.mark.parametrize(
    ("revision", "commit"),
    [(None, "1" * 40), ("main", "1" * 40), ("pr/1", "2" * 40), ("3" * 40, "3" * 40), ("v2", ""), ("../x", "")],
)
def test_the_commit_of_a_hub_id_is_the_one_that_the_cache_knows(
    hub_cache: Path, revision: str | None, commit: str
) -> None:
    refs = hub_cache / "models--owner--name" / "refs"
    (refs / "pr").mkdir(parents=True)
    (refs / "main").write_text("1" * 40)
    (refs / "pr" / "1").write_text("2" * 40)
    (refs.parent / "x").write_text("no commit")
    assert hub_commit("owner/name", revision) == ({"commit": commit} if commit else {})


def test_what_comes_from_elsewhere_has_no_commit(hub_cache: Path, saved: Path) -> None:
    assert hub_commit("random", "1" * 40) == {}
    assert hub_commit(str(saved), "1" * 40) == {}
    assert hub_commit("owner/name", None) == {}


@pytest.mark.parametrize("revision", [None, "1" * 40])
def test_a_hub_model_that_is_not_cached_is_a_missing_dependency(hub_cache: Path, revision: str | None) -> None:
    with pytest.raises(Refused) as caught:
        open_weights("owner/name", revision, seed=0)
    refusal = caught.value.refusal
    assert refusal.outcome is Outcome.MISSING_DEPENDENCY
    assert "owner/name" in refusal.reason
    assert "\n" not in refusal.reason
    assert refusal.remedy.endswith("hf download owner/name")


# Seeded weights


def seeded(architecture: Architecture, seed: int = 0) -> dict[str, torch.Tensor]:
    source = open_weights("random", None, seed)
    assert isinstance(source, RandomWeights)
    shapes = expected_tensors(architecture).items()
    return {name: source.tensor(name, shape, torch.float32, "cpu") for name, shape in shapes}


def test_random_needs_no_folder(small: Architecture) -> None:
    check_weights("random", small)


def test_seeded_weights_depend_on_name_and_seed_and_nothing_else(small: Architecture) -> None:
    weights, again, other = seeded(small), seeded(small), seeded(small, seed=1)
    for name, tensor in weights.items():
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])
    gate, up = (weights[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert gate.shape == up.shape
    assert not torch.equal(gate, up)


def test_seeded_weights_are_the_same_in_any_order(small: Architecture) -> None:
    torch.manual_seed(1)  # the global generator is not used
    source, expected = RandomWeights(0), seeded(small)
    for name, shape in reversed(expected_tensors(small).items()):
        assert torch.equal(source.tensor(name, shape, torch.float32, "cpu"), expected[name])


def test_a_cut_has_the_full_model_s_weights(architecture: Architecture) -> None:
    full, cut = seeded(architecture), seeded(architecture.cut(2))
    assert 0 < len(cut) < len(full)
    assert all(torch.equal(tensor, full[name]) for name, tensor in cut.items())


def test_norms_are_around_one_and_everything_else_around_zero(architecture: Architecture) -> None:
    for name, tensor in seeded(architecture).items():
        std = 1 / 3 if tensor.ndim == 1 else tensor.shape[1] ** -0.5
        around = 1 if "norm" in name else 0
        assert abs(tensor.mean().item() - around) < 5 * std / math.sqrt(tensor.numel()), name
        assert tensor.std().item() == pytest.approx(std, rel=0.25), name


def test_seeded_weights_come_in_the_dtype_that_is_asked_for() -> None:
    tensor = RandomWeights(0).tensor("model.norm.weight", (8,), torch.bfloat16, "cpu")
    assert (tensor.dtype, tensor.shape, tensor.device.type) == (torch.bfloat16, (8,), "cpu")


def test_a_bias_that_no_layer_adds_has_to_be_zero(architecture: Architecture, tmp_path: Path) -> None:
    """Old GPTQ converters wrote a bias for every layer."""
    name = "model.layers.0.mlp.up_proj.bias"
    for value in (0.0, 0.5):
        save_file({name: torch.full((architecture.ffn,), value)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}")
        source = FolderWeights(tmp_path)
        assert source.names == [name]
        if value:
            with pytest.raises(Refused, match=f"holds {name}, for which tiny has no place"):
                check_biases(source, architecture)
        else:
            check_biases(source, architecture)
