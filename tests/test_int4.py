"""Our int4: its layout held against PTX's own description of a tensor core tile, and the format's contract."""

import inspect
import itertools
import math
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from int4_kernels import Int4Kernels
from planning import H200, Plan, refused

from backends.int4.kernel.launches import Launch, Launches, has_room, table
from backends.quant import groupwise
from backends.quant.gptq import Gptq
from backends.quant.int4 import Int4
from backends.tiles import Place
from registry.architecture import Architecture
from registry.compose import Composer
from registry.identity import source_digest
from registry.outcome import BadInput, Outcome, Refused
from registry.testing import LinearFormatContract

FILE = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}


class TestInt4(LinearFormatContract):
    plugin = Int4
    shapes = ((128, 16), (256, 96), (896, 128))


def codes(rows: int, columns: int) -> Any:
    import torch

    return torch.randint(16, (rows, columns), generator=torch.Generator().manual_seed(rows)).to(torch.uint8)


@pytest.mark.parametrize(("rows", "columns"), [(16, 128), (48, 256), (32, 896)])
def test_packing_loses_nothing(rows: int, columns: int) -> None:
    import torch

    from backends.int4.layout import pack, pack_scales, unpack, unpack_scales

    given, scales = codes(rows, columns), torch.rand(rows, columns // 128).half()
    assert torch.equal(unpack(pack(given)), given)
    some = torch.tensor([rows - 1, 0, 9, 8])
    assert torch.equal(unpack(pack(given), some), given[some])
    assert torch.equal(unpack_scales(pack_scales(scales)), scales)


def mma(a: Any, b: Any) -> Any:
    """`mma.m16n8k32` out of each lane's registers: a int64 `[32, 16]`, b `[32, 8]`, the result `[32, 4]`.

    PTX ISA 9, "Matrix Fragments for mma.m16n8k32", for bytes.
    """
    import torch

    left, right = torch.zeros(16, 32, dtype=torch.int64), torch.zeros(32, 8, dtype=torch.int64)
    out = torch.zeros(32, 4, dtype=torch.int64)
    for lane in range(32):
        group, inside = lane // 4, lane % 4
        for i in range(16):
            left[group + 8 * (4 <= i < 8 or i >= 12), inside * 4 + i % 4 + 16 * (i >= 8)] = a[lane, i]
        for i in range(8):
            right[inside * 4 + i % 4 + 16 * (i >= 4), group] = b[lane, i]
    product = left @ right
    for lane in range(32):
        for i in range(4):
            out[lane, i] = product[lane // 4 + 8 * (i >= 2), lane % 4 * 2 + i % 2]
    return out


def signed_bytes(register: int) -> list[int]:
    return list(struct.unpack("4b", struct.pack("<I", register & 0xFFFFFFFF)))


def test_a_lane_s_words_are_what_a_tensor_core_takes() -> None:
    """The kernel's arithmetic, lane by lane: the words' nibbles against the digits that a lane loads."""
    import torch

    from backends.int4.layout import pack

    columns, streams = 256, 3
    given = codes(16, columns)
    words = pack(given)
    x = torch.randint(-32512, 32513, (streams, columns), generator=torch.Generator().manual_seed(1))
    upper = (x + 128) >> 8
    digits = torch.stack([upper, x - 256 * upper])
    sums = torch.zeros(32, 4, dtype=torch.int64)
    for group, step in itertools.product(range(columns // 128), range(4)):
        a, b = torch.zeros(32, 16, dtype=torch.int64), torch.zeros(32, 8, dtype=torch.int64)
        for lane in range(32):
            block, column = lane % 4, lane // 4
            for i in range(2):
                word = int(words[0, group, step // 2, lane, 2 * step % 4 + i])
                a[lane, 8 * i : 8 * i + 4] = torch.tensor(signed_bytes(word & 0xF0F0F0F0))
                a[lane, 8 * i + 4 : 8 * i + 8] = torch.tensor(signed_bytes(word << 4 & 0xF0F0F0F0))
            if column // 2 < streams:
                first = group * 128 + block * 32 + step * 8
                b[lane] = digits[column % 2, column // 2, first : first + 8]
        sums += mma(a, b)
    want = x @ (given.long() - 8).T
    for lane in range(32):
        for half in range(2):
            stream, row = lane % 4, lane // 4 + 8 * half
            found = 256 * sums[lane, 2 * half] + sums[lane, 2 * half + 1]
            assert int(found) == (16 * int(want[stream, row]) if stream < streams else 0)
            assert abs(int(found)) < 2**31


def test_two_digits_are_the_end_of_a_mantissa() -> None:
    """Added to a float, a number and half a lower digit are its last bits, each number exactly."""
    for number in (*range(-32512, 32513, 127), -32512, -129, -128, -1, 0, 1, 127, 128, 32512):
        bits = struct.unpack("<I", struct.pack("<f", 12582912.0 + 128 + number))[0]
        lower, upper, *_ = signed_bytes(bits ^ 0x80)
        assert 256 * upper + lower == number


def linear(rows: int, columns: int) -> Any:
    import torch

    made = torch.nn.Linear(columns, rows, bias=True, dtype=torch.bfloat16).requires_grad_(requires_grad=False)
    made.weight.copy_(torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)))
    return made


def test_a_checkpoint_of_gptq_s_is_the_same_weight() -> None:
    import torch

    gptq, int4, layer = Gptq(Gptq.Options()), Int4(Int4.Options()), linear(64, 256)
    stored = gptq.encode(layer.weight.data, "")
    with torch.inference_mode():
        module = int4.from_tensors(layer, stored)
        assert torch.equal(int4.dequantize(module), gptq.decode(stored).bfloat16())
        assert torch.equal(int4.dequantize(int4.convert(layer)), int4.dequantize(module))


def test_layers_that_share_a_weight_are_what_they_were() -> None:
    import torch

    from backends.int4.stacked import Part, gated, packed, turned

    int4, heads, head_dim = Int4(Int4.Options()), (3, 1, 1), 64
    for order, rows in ((turned(5, 64), [count * head_dim for count in heads]), (gated(48), [48, 48])):
        layers: list[Any] = [int4.convert(linear(count, 256)) for count in rows]
        whole, start = packed(layers, order.argsort()), 0
        assert sorted(order.tolist()) == list(range(sum(rows)))
        for layer, count in zip(layers, rows, strict=True):
            part = Part(whole, start, layer)
            start += count
            assert torch.equal(int4.dequantize(part), int4.dequantize(layer))
            assert torch.equal(int4.bias(part), layer.bias)
            x = torch.randn(2, 256, dtype=torch.bfloat16)
            assert torch.equal(part(x), layer(x))


def test_what_meets_in_a_tile() -> None:
    """Rows r and r + 8: the members of a rotary pair, half a head apart; a gate and its up."""
    from backends.int4.stacked import gated, turned

    for tile in turned(2, 64).reshape(-1, 2, 8).tolist():
        assert [two - one for one, two in zip(*tile, strict=True)] == [32] * 8
    for tile in gated(16).reshape(-1, 2, 8).tolist():
        assert [two - one for one, two in zip(*tile, strict=True)] == [16] * 8


def scaled(stored: dict[str, Any], dtype: str, scale: float) -> None:
    import torch

    stored["scales"] = stored["scales"].to(getattr(torch, dtype))
    stored["scales"][0, 0] = scale


def zeros_of_its_own(stored: dict[str, Any]) -> None:
    import torch

    stored["qzeros"] = groupwise.pack_columns(torch.full((2, 64), 6, dtype=torch.uint8))


NOT_FOLLOWED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an activation order": (lambda stored: stored["g_idx"].copy_(stored["g_idx"].flip(0)), "128 input features"),
    "smaller groups": (
        lambda stored: stored["g_idx"].copy_(stored["g_idx"].new_tensor(range(256)) // 64),
        "128 input",
    ),
    "one group": (lambda stored: stored["g_idx"].zero_(), "128 input features each in their order"),
    "zeros": (zeros_of_its_own, "zeros of its own"),
    "an infinite scale": (lambda stored: scaled(stored, "float16", math.inf), "infinite or no number"),
    "a scale that float16 has not": (lambda stored: scaled(stored, "bfloat16", 1e5), "outside float16"),
    "a scale that float16 loses": (lambda stored: scaled(stored, "bfloat16", 1e-9), "outside float16"),
}


@pytest.mark.parametrize("what", NOT_FOLLOWED)
def test_a_checkpoint_that_it_does_not_follow_is_refused(what: str) -> None:
    int4, layer = Int4(Int4.Options()), linear(64, 256)
    change, told = NOT_FOLLOWED[what]
    stored = Gptq(Gptq.Options()).encode(layer.weight.data, "")
    change(stored)
    with pytest.raises(Refused, match=told):
        int4.from_tensors(layer, stored)


def test_scales_may_be_stored_in_bfloat16() -> None:
    gptq, int4, layer = Gptq(Gptq.Options()), Int4(Int4.Options()), linear(64, 256)
    stored = gptq.encode(layer.weight.data, "")
    stored["scales"] = stored["scales"].bfloat16()
    found = int4.dequantize(int4.from_tensors(layer, stored))
    assert (found.float() - gptq.decode(stored)).abs().max() <= 2**-8 * found.float().abs().max()


def test_a_block_has_room_for_every_model_s_activations_and_not_for_any(composer: Composer) -> None:
    """Otherwise a fused step calls int4's layers: slower, and nothing is refused for it."""
    models = [Architecture.of(composer.cell([f"model={name}"]).model) for name in composer.options("model")]
    assert all(has_room(4, columns) for a in models for columns, _ in a.linear_shapes.values())
    assert has_room(4, 22_500)
    assert not has_room(4, 22_501)
    assert has_room(1, 90_000)


def test_more_streams_than_its_kernel_takes_are_told_before_loading(plan: Plan) -> None:
    refusal = refused(plan("backend=hf", "quant=int4", "protocol.batch_size=9", device=H200), Outcome.UNSUPPORTED)
    assert refusal.reason == "int4 takes up to 8 streams, not 9"
    assert "protocol.batch_size=8" in refusal.remedy
    other = plan("backend=hf", "quant=int4", "protocol.batch_size=8", device=H200).refusal
    assert other is None or other.outcome is Outcome.MISSING_DEPENDENCY


def test_a_missing_nvcc_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    with pytest.raises(Refused, match="nvcc, which compiles") as caught:
        Int4.build(Int4.Options(), "cuda")
    assert caught.value.refusal.outcome is Outcome.MISSING_DEPENDENCY
    assert "CUDA_HOME" in caught.value.refusal.remedy


@pytest.mark.parametrize("change", [{"sym": False}, {"desc_act": True}, {"group_size": 64}])
def test_a_folder_of_another_kind_is_bad_input(change: dict[str, Any]) -> None:
    Int4(Int4.Options()).adopt(FILE)
    with pytest.raises(BadInput, match="use quant=gptq"):
        Int4(Int4.Options()).adopt(FILE | change)


@pytest.mark.parametrize("model", ["qwen2.5-0.5b", "qwen2.5-7b", "mistral-7b-v0.3", "llama-3.1-8b"])
@pytest.mark.parametrize("body", ["hf", "fused"])
def test_the_study_s_models_are_taken(plan: Plan, model: str, body: str) -> None:
    cell = plan("quant=int4", f"model={model}", f"backend={body}", "execution=cuda_graph", device=H200)
    assert cell.refusal is None or cell.refusal.outcome is Outcome.MISSING_DEPENDENCY


def test_a_head_of_four_bits_needs_less_memory(plan: Plan) -> None:
    """Of Qwen2.5-7B's 152064 x 3584 weights, 2 bytes each become 4.125 bits."""
    need, less = (plan(f"quant={name}", "model=qwen2.5-7b").memory_need for name in ("int4", "int4-head4"))
    assert need - less == pytest.approx(152064 * 3584 * (2 - 4.125 / 8))
    assert plan("quant=none", "model=qwen2.5-7b").memory_need > need


def test_another_kernel_is_another_measurement() -> None:
    """The files that the extension is made of are there to be hashed."""
    folder = Path(inspect.getfile(Int4)).parent
    assert all((folder / name).is_file() for name in Int4.data)
    assert source_digest(Int4.__module__, Int4.data) != source_digest(Int4.__module__)


def test_an_older_gpu_is_refused(plan: Plan) -> None:
    older = replace(H200, name="NVIDIA L4", capability=(8, 9))
    assert "compute capability 9.0" in refused(plan("quant=int4", device=older), Outcome.UNSUPPORTED).reason


def test_groups_of_another_size_are_bad_input(plan: Plan) -> None:
    with pytest.raises(BadInput, match="group_size=64: int4's kernel has groups of 128"):
        plan("quant=int4", "quant.options.group_size=64")


def test_a_head_of_other_bits_is_bad_input(plan: Plan) -> None:
    with pytest.raises(BadInput, match="head_bits=8"):
        plan("quant=int4", "quant.options.head_bits=8")


def test_a_head_that_makes_no_whole_tiles_is_refused_before_anything_loads(plan: Plan) -> None:
    with pytest.raises(BadInput, match=r"LM head of .* has 32001: use quant\.options\.head_bits=16"):
        plan("quant=int4-head4", "model.vocab=32001")
    assert plan("quant=int4", "model.vocab=32001").config.model.vocab == 32001


SHAPES = [(4608, 3584), (3584, 18944), (128, 896), (4096, 14336), (896, 4864)]


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("streams", [1, 3, 8])
def test_the_kernel_multiplies(rows: int, columns: int, streams: int) -> None:
    """However it is launched, against float32, its output poisoned beforehand."""
    import torch

    from backends.int4.kernel.launches import SHARED_BYTES, WARPS
    from backends.int4.kernel.loader import extension
    from backends.int4.layout import AT_ONCE

    int4 = Int4(Int4.Options())
    layer = linear(rows, columns).cuda()
    with torch.inference_mode():
        module: Any = int4.convert(layer)
        x = torch.randn(streams, columns, device="cuda", dtype=torch.bfloat16)
        want = x.float() @ int4.dequantize(module).float().T + layer.bias.float()
        poison = [torch.full_like(want, torch.nan, dtype=torch.bfloat16) for _ in range(64)]
        del poison  # what the kernel's output is allocated in

        def close(out: torch.Tensor, what: str) -> None:
            error = (out.float() - want).norm() / want.norm()
            assert error < 0.005, what

        close(module(x), "the layer")
        if x.nbytes > SHARED_BYTES or streams > AT_ONCE:
            return
        for warps in WARPS:
            for blocks in (1, 132, 4096):
                out = extension().product(x, module.words, module.scales, module.bias, warps, blocks)
                close(out, f"{warps} warps, {blocks} blocks")


@pytest.mark.gpu
@pytest.mark.parametrize("value", [0.0, 1e-38, 3e4, 2e37, math.inf, math.nan])
def test_activations_of_any_size(value: float) -> None:
    """A group of nothing but one number, or of what is none: an infinity is one of a group that has no unit."""
    import torch

    int4, layer = Int4(Int4.Options()), linear(64, 256).cuda()
    with torch.inference_mode():
        module: Any = int4.convert(layer)
        x = torch.zeros(2, 256, device="cuda", dtype=torch.bfloat16)
        x[1] = torch.randn(256, device="cuda")
        x[0, 130] = value
        out = module(x).float()
        want = x.float() @ int4.dequantize(module).float().T + layer.bias.float()
        assert torch.equal(out.isnan(), ~want.isfinite()), "what is no number stays none, in its own stream alone"
        if math.isfinite(value):
            assert (out - want).norm(dim=-1).le(0.005 * want.norm(dim=-1)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("largest", [129 / 128, 302, 30080])  # of which no number of bf16 is a half part
def test_activations_are_counted_in_parts_of_their_group_s_largest(largest: float) -> None:
    """Exactly what is left of them when they are rounded to those parts, also where most are small beside one."""
    import torch

    from backends.int4 import layout
    from backends.int4.kernel.loader import extension

    int4, columns, streams = Int4(Int4.Options()), 512, 3
    with torch.inference_mode():
        module: Any = int4.convert(linear(256, columns).cuda())
        x = torch.randn(streams, columns, device="cuda").clamp(-1, 1).bfloat16()
        x[:, 77::128] = largest
        groups = x.double().unflatten(-1, (-1, 128))
        unit = groups.abs().amax(-1, keepdim=True) / 32512
        counted = ((groups / unit).round() * unit).flatten(1)
        weight = layout.weight(module.words, module.scales).double()
        want = counted @ weight.T
        out = torch.full((streams, 256), math.nan, device="cuda")
        tickets = torch.zeros(2, dtype=torch.int64, device="cuda")
        extension().logits(x, None, EPS, module.words, module.scales, out, tickets, 4, 132)
        assert (out - want).norm() <= 5e-6 * want.norm()
        assert (x.double() @ weight.T - want).norm() > 5e-6 * want.norm(), "it is seen that they are rounded"


ENDINGS = ("product", "residual", "swiglu", "logits", "qkv")
EPS = 1e-5
ROUNDED, EXACT = 2e-3, 1e-3
"""Of an output's norm: sums come in another order, and in bf16 the two sides of a middle are rounded apart."""


def surroundings(ending: str, streams: int, groups: int, head_dim: int, device: str) -> dict[str, Any]:
    """What an ending reads: a weight of nine tiles, or of heads; a cache of which one row is this token's."""
    import torch

    numbers = torch.Generator().manual_seed(streams * groups)

    def normal(*shape: int, dtype: Any = torch.bfloat16) -> Any:
        return torch.randn(shape, generator=numbers).to(device, dtype)

    q, kv, capacity, columns = 3, 2, 5, 128 * groups
    rows = (q + 2 * kv) * head_dim if ending == "qkv" else 9 * 16
    layer = linear(rows, columns).to(device)
    layer.weight.mul_(columns**-0.5)
    packed: Any = Int4(Int4.Options()).convert(layer)
    angles = normal(capacity, head_dim // 2, dtype=torch.float32)
    means = torch.arange(2, streams + 3, device=device)  # one more than there are streams, as a step's buffers may be
    return {
        "x": normal(streams, columns),
        "words": packed.words,
        "scales": packed.scales,
        "bias": packed.bias,
        "squares": means * columns << 24,
        "begun": means << 32,
        "residual": normal(streams, rows, dtype=torch.float32),
        "gain": normal(rows),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "length": torch.tensor(2, dtype=torch.int32, device=device),
        "queries": q * head_dim,
        "cache": (kv, capacity, head_dim),
    }


def called(kernels: Any, ending: str, given: dict[str, Any], launch: tuple[int, int]) -> dict[str, Any]:
    """What an ending leaves, by name: what it writes was poisoned beforehand, what it adds to was what is given."""
    import torch

    x, packed = given["x"], (given["words"], given["scales"])
    behind = (x, given["squares"], EPS, *packed)
    streams, rows = len(x), packed[0].shape[0] * 16

    def poisoned(*shape: int, dtype: Any = torch.bfloat16) -> Any:
        return torch.full((streams, *shape), torch.nan, dtype=dtype, device=x.device)

    if ending == "product":
        poisoned(rows)  # let go at once: what the output is allocated in
        return {"out": kernels.product(x, *packed, given["bias"], *launch)}
    if ending == "residual":
        out = {"residual": given["residual"].clone(), "scaled": poisoned(rows), "squares": given["begun"].clone()}
        kernels.residual(x, *packed, out["residual"], given["gain"], out["scaled"], out["squares"], *launch)
        return out
    if ending == "qkv":
        cache = given["cache"]
        out = {"q": poisoned(given["queries"]), "keys": poisoned(*cache), "values": poisoned(*cache)}
        around = (given["bias"], given["cos"], given["sin"], given["length"])
        kernels.qkv(*behind, *around, *out.values(), *launch)
        return out
    out = {"out": poisoned(rows // 2) if ending == "swiglu" else poisoned(rows, dtype=torch.float32)}
    out["tickets"] = torch.zeros(2, dtype=torch.int64, device=x.device)
    getattr(kernels, ending)(*behind, *out.values(), *launch)
    return out


def assert_alike(got: dict[str, Any], want: dict[str, Any], what: str) -> None:
    import torch

    for name, wanted in want.items():
        found, written = got[name], ~wanted.isnan()
        assert torch.equal(~found.isnan(), written), f"{what}: {name} is not written where it should be, or elsewhere"
        off, norm = (float(tensor[written].double().norm()) for tensor in (found - wanted, wanted))
        allowed = ROUNDED if wanted.dtype == torch.bfloat16 else EXACT
        assert off <= allowed * norm, f"{what}: {name} is off by {off:.2g} of {norm:.2g}"


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 19])
@pytest.mark.parametrize("streams", [1, 3, 4], ids="streams{}".format)
@pytest.mark.parametrize("ending", ENDINGS)
def test_an_ending_is_what_its_stand_in_computes(ending: str, streams: int, groups: int) -> None:
    """Blocks so few that each has several tiles, and as many as there are tiles.

    One group leaves all warps but one without; nineteen are more than most blocks' warps have under way.
    """
    import torch

    from backends.int4.kernel.launches import WARPS
    from backends.int4.kernel.loader import extension

    with torch.inference_mode():
        for head_dim in (64, 128) if ending == "qkv" else (64,):
            given = surroundings(ending, streams, groups, head_dim, "cuda")
            tiles = len(given["words"])
            for around in (given, given | {"bias": None, "squares": None}):
                want = called(Int4Kernels, ending, around, (0, 0))
                for warps, blocks in itertools.product(WARPS, (1, 2, 3, 4096)):
                    what = f"{warps} warps, {blocks} blocks, heads of {head_dim}"
                    if "tickets" in want:  # one for each tile that is not a block's first
                        want["tickets"] = torch.tensor([tiles - min(blocks, tiles), 0], device="cuda")
                    assert_alike(called(extension(), ending, around, (warps, blocks)), want, what)


@pytest.mark.gpu
def test_a_launch_that_fails_leaves_nothing_behind() -> None:
    """More shared memory than there is: the error is told once, and not to whoever comes next."""
    import torch

    from backends.int4.kernel.loader import extension

    with torch.inference_mode():
        module: Any = Int4(Int4.Options()).convert(linear(128, 32768).cuda())
        x = torch.randn(4, 32768, device="cuda", dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match="the product did not launch"):
            extension().product(x, module.words, module.scales, module.bias, 4, 132)
        assert torch.ones(8, device="cuda").sum().item() == 8


def test_a_launch_is_what_is_known_of_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backends.int4.kernel.launches._device", lambda _: ("a GPU", 132))
    known = Launches([])
    assert known.launch("cuda:0", 288, 28, 1) == (14, 264)
    assert known.launch("cuda:0", 8, 7, 1) == (7, 528)
    assert known.launch("cuda:0", 8, 5, 1) == (4, 924), "where no number of warps is nearly always full, the fewest"
    known.set(Place("a GPU", "int4", 4608, 3584, 1), Launch(7, 3))
    assert known.launch("cuda:0", 288, 28, 1) == (7, 396)
    assert known.launch("cuda:0", 288, 56, 1) == (14, 264)


def test_streams_may_have_a_launch_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backends.int4.kernel.launches._device", lambda _: ("a GPU", 132))
    known = Launches([])
    known.set(Place("a GPU", "int4", 4608, 3584, 1), Launch(7, 3))
    assert known.launch("cuda:0", 288, 28, 4) == (7, 396), "nothing is known of four, so what is known of one holds"
    known.set(Place("a GPU", "int4", 4608, 3584, 4), Launch(8, 1))
    assert known.launch("cuda:0", 288, 28, 4) == (8, 132)
    assert known.launch("cuda:0", 288, 28, 3) == (7, 396)
    assert known.launch("cuda:0", 288, 28, 1) == (7, 396)


def test_every_launch_that_is_known_says_of_how_many_streams() -> None:
    """One tuned for more streams would otherwise take the place of one stream's."""
    assert all(row["place"].get("streams") for row in table().known())


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_what_the_sanitizer_is_run_on_is_there(tool: str) -> None:
    """`-k` with names that no test has selects nothing, and the sanitizer finds nothing wrong with it."""

    def output(*command: str) -> str:
        root = Path(__file__).parents[1]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout

    recipe = output("make", "--dry-run", "--always-make", "sanitize").replace("\\\n", "")
    [call] = [shlex.split(line) for line in recipe.splitlines() if f"--tool {tool}" in line]
    files, selected = [word for word in call if word.endswith(".py")], call[call.index("-k") + 1]
    listed = output(sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", *files, "-k", selected)
    names = [line for line in listed.splitlines() if "::" in line]
    for alternative in selected.split(" or "):
        assert any(all(word in name for word in alternative.split(" and ")) for name in names), alternative
