"""EXL2's storage: our encoder, our decoder, and how many bits a weight it takes; ExLlamaV2's body on a GPU."""

import dataclasses
import importlib.util
import itertools
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backends.exllamav2 import ExLlamaV2Backend
from backends.quant.exl2 import WIDTHS, Exl2, mixture, pack, unpack
from backends.quant.gptq import Gptq
from registry.api import Refused, Setup
from registry.synthesis import write_checkpoint
from registry.testing import TINY, BackendContract
from registry.weights import FolderWeights, RandomWeights, check_folder


class Both(FolderWeights):
    """A folder that also tells the weights that its codes stand for."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder)
        self._random = RandomWeights(seed)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: Any, device: str) -> torch.Tensor:
        if name not in self._files:
            return self._random.tensor(name, shape, dtype, device)
        return super().tensor(name, shape, dtype, device)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("exllamav2") is None, reason="exllamav2 is not installed")
class TestExLlamaV2(BackendContract):
    """ExLlamaV2's own loader, model, cache and kernels, on folders of ours."""

    plugin = ExLlamaV2Backend
    formats = ("exl2", "gptq")
    device = "cuda"
    architecture = dataclasses.replace(TINY, hidden=256, head_dim=64)
    dtype = "float16"
    buffer_bytes = 2**26  # its scratch space
    repeat_tolerance = 0.01  # sums over parts of a row are added up in no fixed order

    @pytest.fixture(autouse=True)
    def _folders(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.root: Path = tmp_path_factory.mktemp("models")
        self.count = itertools.count()

    def setup(self, cache: str, quant: str, batch_size: int = 1, seed: int = 0) -> Setup:
        made = super().setup(cache, quant, batch_size, seed)
        folder = self.root / str(next(self.count))
        form: Any = made.linear
        write_checkpoint(folder, self.architecture, RandomWeights(seed), form, "cuda", lambda _: None)
        check_folder(folder, self.architecture, form)
        return dataclasses.replace(made, weights=Both(folder, seed))

    def unread_embedding_bytes(self) -> int:
        return self.architecture.vocab * self.architecture.hidden * 2


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_is_undone(bits: int) -> None:
    codes = torch.randint(2**bits, (96, 8), dtype=torch.uint8)
    words = pack(codes, bits)
    assert (words.shape, words.dtype) == ((96 * bits // 32, 8), torch.int32)
    assert torch.equal(unpack(words, bits), codes)


def test_rows_stand_in_the_words_lowest_bits_first() -> None:
    """Row r of b bits begins at bit r * b of its column's stream."""
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    codes[7] = 0b10110  # 5 bits from bit 35 on: the second word's bits 3 to 7
    assert pack(codes, 5).flatten().tolist() == [0, 0b10110 << 3, 0, 0, 0]
    codes[6] = 0b10001  # bits 30 to 34: two in the first word, three in the second
    assert pack(codes, 5).flatten().tolist() == [0b01 << 30, 0b10110 << 3 | 0b100, 0, 0, 0]


@pytest.mark.parametrize("bpw", [2.5, 3.0, 4.0, 4.25, 5.5, 6.0, 8.0])
def test_a_layer_takes_the_bits_that_were_asked_for(bpw: float) -> None:
    form = Exl2(Exl2.Options(bpw=bpw))
    weight = torch.randn(512, 2048)
    tensors = form.encode(weight, "model.layers.0.mlp.up_proj")
    taken = sum(tensor.nbytes for tensor in tensors.values()) * 8 / weight.numel()
    assert taken == pytest.approx(bpw, abs=0.11 if bpw < 8 else 0.2)


def test_the_head_has_bits_of_its_own() -> None:
    form = Exl2(Exl2.Options())
    weight = torch.randn(256, 1024)
    assert form.encode(weight, "lm_head")["q_groups"][::2].float().mean() > 5.5
    assert form.encode(weight, "x")["q_groups"][::2].float().mean() < 4.5


def test_wider_groups_come_first() -> None:
    widths = mixture(4.25, 3584, 18944, 128)
    assert widths == sorted(widths, reverse=True)
    assert set(widths) == {5, 4}
    assert 4.15 < sum(widths) / len(widths) < 4.25


@pytest.mark.parametrize(("bpw", "cosine"), [(2.5, 0.85), (4.25, 0.99), (6.0, 0.998), (8.0, 0.9999)])
def test_decoding_gives_the_weight_back(bpw: float, cosine: float) -> None:
    form = Exl2(Exl2.Options(bpw=bpw))
    weight = torch.randn(1024, 512)
    weight[:, 3] *= 10
    weight[5] = 0
    decoded = form.decode(form.encode(weight, "x"))
    assert decoded.shape == weight.shape
    assert torch.nn.functional.cosine_similarity(decoded.flatten(), weight.flatten(), dim=0) > cosine
    assert (decoded[:, 3].abs().mean() / weight[:, 3].abs().mean() - 1).abs() < 0.2, "rows are back in their place"


# ExLlamaV2's body, as far as it goes without a GPU


def body(architecture: Any, folder: Path) -> Any:
    """A backend that has loaded nothing, and knows which tensors its folder holds."""
    weights, linear = FolderWeights(folder), Gptq(Gptq.Options())
    setup = types.SimpleNamespace(architecture=architecture, weights=weights, linear=linear)
    backend: Any = ExLlamaV2Backend(setup)  # type: ignore[arg-type]
    backend.model = types.SimpleNamespace(config=types.SimpleNamespace(tensor_file_map=dict(setup.weights._files)))
    return backend


@pytest.fixture
def gptq(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "gptq", TINY, RandomWeights(0), Gptq(Gptq.Options()), "cpu", lambda _: None)
    return tmp_path / "gptq"


def changed(folder: Path, name: str, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors")


def test_groups_in_order_need_no_index(gptq: Path) -> None:
    name = "model.layers.1.mlp.down_proj.g_idx"
    changed(gptq, name, lambda groups: groups.flip(0).contiguous())
    backend = body(TINY, gptq)
    backend._drop_sequential_g_idx()
    assert [left for left in backend.model.config.tensor_file_map if left.endswith("g_idx")] == [name]


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (
            "model.layers.1.mlp.up_proj.scales",
            lambda t: t.fill_(float("inf")),
            "a scale that is infinite or no number",
        ),
        ("model.layers.1.self_attn.k_proj.bias", lambda t: t.bfloat16(), "takes biases in float16"),
    ],
)
def test_what_exllamav2_would_fail_on_is_refused(gptq: Path, name: str, change: Any, told: str) -> None:
    body(TINY, gptq)._check_tensors()
    changed(gptq, name, change)
    with pytest.raises(Refused, match=told):
        body(TINY, gptq)._check_tensors()


def test_exllamav2_is_told_of_the_rotary_embedding(gptq: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = types.SimpleNamespace()
    body(dataclasses.replace(TINY, rope_scaling=scaling), gptq)._set_rotary(config)
    assert (config.rotary_embedding_base, config.alt_rope_method) == (TINY.rope_theta, "llama3")
    assert (config.l3_rope_factor, config.l3_rope_original_max_position_embeddings) == (8.0, 8192)
    with pytest.raises(Refused, match="not of yarn"):
        body(dataclasses.replace(TINY, rope_scaling={"type": "yarn"}), gptq)._set_rotary(config)


def test_a_build_that_was_killed_keeps_none_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's build leaves a file behind when it is killed, and the next one would wait for its end."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "exllamav2_ext").mkdir()
    left = tmp_path / "exllamav2_ext" / "lock"
    left.touch()
    monkeypatch.setitem(sys.modules, "exllamav2", types.ModuleType("exllamav2"))
    ExLlamaV2Backend.build(None, "cuda")
    assert not left.exists()
