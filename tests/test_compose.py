"""Command line to cells: what composes, what Hydra would make of it, and what is refused."""

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import time
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hypothesis import given, settings
from hypothesis import strategies as st

from registry import sweep
from registry.axes import MOST
from registry.compose import CONF, Composer, to_config
from registry.outcome import BadInput
from registry.plugins import KINDS, Catalog
from registry.schema import GROUPS, Config, from_plain

OPTIONS = [
    (group, option)
    for group in GROUPS
    for option in Composer(Catalog()).options(group)
    if (group == "experiment") == (option == "none")  # the named ones are sweeps: tests/test_experiments.py
]


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty working directory."""
    with contextlib.chdir(tmp_path_factory.mktemp("cwd")):
        yield Path.cwd()


def compose(composer: Composer, *overrides: str, multirun: bool = False) -> list[Config]:
    return [composer.cell(job) for job in composer.jobs(overrides, multirun)]


def refusal(composer: Composer, *overrides: str, multirun: bool = False) -> str:
    with pytest.raises(BadInput) as caught:
        compose(composer, *overrides, multirun=multirun)
    return str(caught.value)


# What conf/ and the plugins offer


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_to_a_typed_cell(composer: Composer, group: str, option: str) -> None:
    [cell] = compose(composer, f"{group}={option}")
    assert isinstance(getattr(cell, group), typing.get_type_hints(Config)[group])
    assert getattr(cell, group).name == option
    assert from_plain(Config, json.loads(json.dumps(dataclasses.asdict(cell)))) == cell


@pytest.mark.parametrize("file", sorted(CONF.glob("*/*.yaml")), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_file_is_an_option(composer: Composer, file: Path) -> None:
    assert file.stem in composer.options(file.parent.name)


@pytest.mark.parametrize(("group", "option"), [pair for pair in OPTIONS if pair[0] in KINDS])
def test_every_plugin_option_names_an_announced_plugin(composer: Composer, group: str, option: str) -> None:
    assert getattr(composer.cell([f"{group}={option}"]), group).plugin in [*Catalog().names(group), "auto"]


@pytest.mark.parametrize("model", [option for group, option in OPTIONS if group == "model"])
def test_every_model_has_a_source(composer: Composer, model: str) -> None:
    assert composer.cell([f"model={model}"]).model.source.strip()


@pytest.mark.parametrize("gpu", [option for group, option in OPTIONS if group == "gpu"])
def test_every_number_of_a_gpu_profile_has_a_source_and_no_other_line(composer: Composer, gpu: str) -> None:
    profile = composer.cell([f"gpu={gpu}"]).gpu
    names = ("peak_bandwidth_gbs", "memory_gb", "compute_capability", "price_usd_per_hour")
    assert set(profile.sources) == {name for name in names if getattr(profile, name) is not None}
    assert all(source.strip() for source in profile.sources.values())


def test_profiles_are_the_concrete_ones_and_share_no_device_name(composer: Composer) -> None:
    profiles = composer.profiles()
    assert sorted(profiles) == [name for name in composer.options("gpu") if name != "auto"]
    assert max(Counter(name for p in profiles.values() for name in p.nvml_names).values()) == 1


def test_context_is_short_for_protocol_context(composer: Composer) -> None:
    [short], [long] = compose(composer, "context=4096"), compose(composer, "protocol.context=4096")
    assert short == long
    assert (short.context, short.protocol.context) == (None, 4096)


def test_plus_adds_a_plugin_option_and_equals_changes_one(composer: Composer) -> None:
    [added] = compose(composer, "quant=nf4", "+quant.options.new=[1,a]", "quant.options.block_size=128")
    assert added.quant.options == {"block_size": 128, "levels": "nf4", "double_quant": False, "new": [1, "a"]}


# The same as Hydra


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=tiny"],
        ["model=llama-3.1-8b", "gpu=h100", "protocol=paper", "model.rope_scaling.factor=4"],
        ["gpu=h200", "gpu.price_usd_per_hour=3", "model.layers=2", "protocol.threads=2"],
        ["quant=nf4", "quant.options.block_size=128", "+quant.options.extra={a:[1,2],b:null}"],
        [
            "attention=sdpa-math",
            "execution=cuda_graph",
            "execution.cache=dynamic",
            "attention.options.kernel=flash",
        ],
        ["model.weights='a, b=c'", "records=/somewhere/else", "dry_run=true", "context=100"],
        ["backend.plugin=${model.name}", "model.revision=null", "gpu.nvml_names=[A,'B C']"],
        ["model=tiny", "model=qwen2.5-7b", "protocol.seed=1", "protocol.seed=2"],
    ],
    ids=" ".join,
)
def test_a_cell_is_what_hydra_composes(composer: Composer, overrides: list[str]) -> None:
    [job] = composer.jobs(overrides, multirun=False)
    with hydra.initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        expected = to_config(hydra.compose("config", job))
    assert dataclasses.asdict(composer.cell(job)) == dataclasses.asdict(expected)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=tiny,qwen2.5-7b", "protocol.seed=1,2,3", "gpu=h100"],
        ["protocol.seed=range(0,4)", "model=choice(tiny,llama-3.1-8b)"],
        ["model=glob(*)", "context=sort(4096,512)"],
        ["model.weights='a,b',c", "quant=none,nf4", "+quant.options.x=1,2"],
        ["protocol.seed=1,2", "model=tiny", "protocol.seed=3,4"],
        ["gpu.nvml_names=[a,b],[c]", "dry_run=true,false"],
        ["model=tiny"],
        [],
    ],
    ids=" ".join,
)
def test_a_sweep_has_the_order_of_hydra_s_sweeper(composer: Composer, overrides: list[str]) -> None:
    [expected] = BasicSweeper.split_arguments(composer._parser.parse_overrides(overrides), None)
    assert composer.jobs(overrides, multirun=True) == expected


def test_the_last_axis_varies_fastest(composer: Composer) -> None:
    cells = compose(composer, "model=tiny,qwen2.5-7b", "context=8,16", multirun=True)
    assert [(cell.model.name, cell.protocol.context) for cell in cells] == [
        ("tiny", 8),
        ("tiny", 16),
        ("qwen2.5-7b", 8),
        ("qwen2.5-7b", 16),
    ]


def test_a_sweep_composes_each_combination_of_groups_once(monkeypatch: pytest.MonkeyPatch) -> None:
    composer = Composer(Catalog())
    calls: Counter[tuple[str, ...]] = Counter()
    load = composer._loader.load_configuration

    def counting(config_name: str, overrides: list[str], **kwargs: Any) -> Any:
        calls[tuple(overrides)] += 1
        return load(config_name, overrides, **kwargs)

    monkeypatch.setattr(composer._loader, "load_configuration", counting)
    study = ("model=qwen2.5-7b,mistral-7b-v0.3,llama-3.1-8b", "gpu=h100,a100-80gb,l40s,l4")
    cells = compose(composer, *study, "context=2048,4096,8192,16384", multirun=True)
    assert len(cells) == len({json.dumps(dataclasses.asdict(cell)) for cell in cells}) == 48
    assert set(calls.values()) == {1}
    assert len([choices for choices in calls if choices]) == 12


def test_cells_of_one_combination_share_nothing(composer: Composer) -> None:
    first, second = (composer.cell(["quant=nf4"]) for _ in range(2))
    first.quant.options["block_size"] = 1
    assert second.quant.options["block_size"] != 1


def test_composing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from registry.compose import Composer; from registry.plugins import Catalog\n"
        "composer = Composer(Catalog()); composer.profiles()\n"
        "print(sorted({'torch', 'transformers', 'mlflow', 'backends.hf'} & set(sys.modules)))"
    )
    # -P and an empty working directory: rfloor as it is installed
    done = subprocess.run([sys.executable, "-Pc", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Refused


@pytest.mark.parametrize(
    ("override", "told"),
    [
        # misspelt
        ("modle=tiny", "did you mean model?"),
        ("model=tinny", "did you mean tiny?"),
        ("model=qwen2.5-7B", "did you mean qwen2.5-7b"),
        ("quant=nf5", "did you mean nf4?"),
        ("model=null", "no model is called 'null'"),
        ("model=[tiny]", "did you mean tiny?"),
        ("model=../model/tiny", "no model is called"),
        ("model={name:tiny}", "no model is called"),
        ("protocol.contxt=3", "did you mean protocol.context"),
        ("protcol.context=3", "did you mean protocol?"),
        ("contxt=3", "did you mean context?"),
        ("model.layers.x=1", "no key is called 'model.layers.x'"),
        ("quant.options.block_size=32", "+quant.options.block_size=VALUE adds it"),
        ("rfloor_schema=1", "no key is called 'rfloor_schema'"),
        ("=", "no key is called ''"),
        # of the wrong type, or missing
        ("context=abc", "context: Value 'abc'"),
        ("context=1.5", "context: Value '1.5'"),
        ("protocol.seed=null", "protocol.seed"),
        ("model.tied_embeddings=maybe", "model.tied_embeddings"),
        ("gpu.peak_bandwidth_gbs=fast", "gpu.peak_bandwidth_gbs"),
        ("gpu.nvml_names={a:1}", "gpu.nvml_names"),
        ("quant.options=null", "quant.options"),
        ("quant.options=abc", "quant.options"),
        ("records=[a]", "records"),
        ("protocol.context=???", "protocol.context"),
        ("model.weights=${nope}", "model.weights"),
        ("model.weights=${model.weights}", "model.weights"),
        ('model.weights=${oc.decode:"{"}', "mismatched input"),
        ("model.rope_scaling={factor:2}", "model.rope_scaling: qwen2.5-0.5b has none"),
        ("+model.rope_scaling.factor=2", "model.rope_scaling: qwen2.5-0.5b has none"),
        # removed, added, moved
        ("~model", "cannot be removed"),
        ("~protocol.context", "cannot be removed"),
        ("~hydra/launcher", "cannot be removed"),
        ("+new=1", "+ adds a plugin's option"),
        ("++protocol.context=5", "+ adds a plugin's option"),
        ("+model=tiny", "+ adds a plugin's option"),
        ("+quant.weight_bits=5", "+ adds a plugin's option"),
        ("+quant.options=5", "+ adds a plugin's option"),
        ("model@gpu=tiny", "a group keeps its place"),
        ("model@_global_=tiny", "a group keeps its place"),
        ("hydra/launcher@hydra.callbacks=basic", "a group keeps its place"),
        # sweeps
        ("model=tiny,qwen2.5-7b", "add -m: python runner.py -m model=tiny,qwen2.5-7b"),
        ("context=range(1,3)", "add -m"),
        ("model=glob(*)", "add -m"),
        # code
        ("model._target_=os.system", "_target_"),
        ("+quant.options._target_=os.system", "_target_"),
        ("quant.options={_target_:os.system}", "_target_"),
        ("hydra.launcher._target_=os.system", "_target_"),
        ("hydra.callbacks.sweep._target_=os.system", "_target_"),
        # Hydra's own
        ("hydra.callbacks=null", "hydra.verbose"),
        ("hydra.job_logging.root.level=DEBUG", "hydra.verbose"),
        ("hydra.hydra_logging.version=1", "hydra.verbose"),
        ("hydra.searchpath=[/tmp]", "hydra.verbose"),
        ("hydra.sweep.dir=elsewhere", "hydra.verbose"),
        ("hydra.run.dir=elsewhere", "hydra.verbose"),
        ("hydra.job.chdir=true", "hydra.verbose"),
        ("hydra.mode=RUN", "hydra.verbose"),
        ("hydra/sweeper=basic", "hydra.verbose"),
        ("hydra/job_logging=default", "hydra.verbose"),
        ("hydra/launcher=basik", "did you mean basic?"),
        ("hydra.launcher.n_jobs=3", "no key is called 'hydra.launcher.n_jobs'"),
        # unparsable
        ("model", "cannot read an override"),
        ("", "cannot read an override"),
        ("a=b=c", "cannot read an override"),
        ("model.weights=${", "cannot read an override"),
        ("model.weights=[", "cannot read an override"),
        ("model.weights=\udcff", "cannot read an override"),
        ("model@a:b=tiny", "cannot read an override"),
        ("model..layers=3", "cannot read an override"),
        ("gpu.nvml_names[0]=a", "cannot read an override"),
    ],
)
def test_bad_input_is_refused_in_words(composer: Composer, folder: Path, override: str, told: str) -> None:
    message = refusal(composer, "protocol=paper", override)
    assert told in message
    assert "\n" not in message
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["context=1,2", "protocol.context=3"], "give one"),
        (["model=tiny,tinny"], "did you mean tiny?"),
        (["quant=nf4", "quant.options.blok_size=32,64"], "did you mean block_size?"),
        (["quant=nf4,none", "quant.options.block_size=32"], "quant.options.block_size"),
        (["model=llama-3.1-8b,tiny", "model.rope_scaling.factor=2"], "tiny has none"),
        (["model=llama-3.1-8b", "model.rope_scaling.factr=2"], "did you mean factor"),
        (["context=1,two"], "context: Value 'two'"),
        (["context=interval(1,2)"], "a sweep lists its values"),
        (["context=range(3,1)"], "no values"),
        (["model=glob(nothing*)"], "no values"),
        (["hydra/launcher=basic,basic"], "cannot be swept"),
        (["hydra.verbose=true,false"], "cannot be swept"),
    ],
    ids=str,
)
def test_one_bad_cell_refuses_the_sweep(composer: Composer, folder: Path, overrides: list[str], told: str) -> None:
    assert told in refusal(composer, *overrides, multirun=True)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("gpu.nvml_names=[{a:1}]", "gpu.nvml_names.0 is a dict"),
        ("gpu.nvml_names=[[a]]", "gpu.nvml_names.0 is a list"),
    ],
)
def test_a_list_of_texts_has_texts_alone(composer: Composer, override: str, told: str) -> None:
    assert refusal(composer, "gpu=l4", override) == told


def test_a_misspelt_option_lists_all_there_are(composer: Composer) -> None:
    message = refusal(composer, "gpu=h1000")
    assert message.endswith("Known: " + ", ".join(composer.options("gpu")))


@pytest.mark.parametrize("override", ["hydra/launcher=basic", "hydra.verbose=true", "hydra.verbose=[registry]"])
def test_hydra_keys_that_a_call_may_set_are_no_axis(composer: Composer, override: str) -> None:
    assert composer.jobs([override, "model=tiny"], multirun=True) == [["model=tiny"]]


def fragments(composer: Composer) -> list[str]:
    """Pieces of override text: enough of the grammar and of the schema to get past the first check."""
    plain = dataclasses.asdict(composer.cell([]))
    keys = [f"{group}.{key}" for group in GROUPS for key in plain[group]]
    options = [option for _, option in OPTIONS]
    grammar = re.split(r"\s+", "+ ++ ~ @ : = , . / [ ] { } ( ) ' \" \\ $ ${ null true ??? 1 1e9 -1 nan _global_")
    calls = ["range(1,3)", "choice(", "glob(*)", "sort(", "shuffle(", "int(", "json_str(", "interval(0,1)"]
    resolvers = ["${oc.env:HOME}", "${model.name}", "${..name}", "${oc.create:", "${oc.decode:"]
    hydra_keys = ["hydra", "hydra.launcher.", "hydra/launcher", "hydra.verbose", "hydra.sweep.dir"]
    more = [
        "model.rope_scaling.factor",
        "+quant.options.a",
        "gpu.sources.a",
        "context",
        " ",
        "\n",
        "é",
        "\x00",
    ]
    return [*GROUPS, *keys, *options, *grammar, *calls, *resolvers, *hydra_keys, *more]


@settings(max_examples=200)
@given(data=st.data(), multirun=st.booleans())
def test_any_text_composes_or_is_bad_input(
    composer: Composer, folder: Path, data: st.DataObject, multirun: bool
) -> None:
    pieces = st.sampled_from(fragments(composer))
    assignment = st.tuples(pieces, st.just("="), pieces, st.lists(pieces, max_size=3).map("".join)).map("".join)
    overrides = data.draw(
        st.lists(st.text(max_size=20) | st.lists(pieces, max_size=6).map("".join) | assignment, max_size=3)
    )
    with contextlib.suppress(BadInput):
        compose(composer, *overrides, multirun=multirun)
    assert not list(folder.iterdir())


# How many


@pytest.mark.parametrize(
    "overrides",
    [
        ["context=range(0,1000000000)"],
        ["context=range(0,100000000000000000000000000000000)"],
        ["context=range(0,-1000000000,-1)"],
        ["context=range(0.0,1.0,1e-9)"],
        ["context=range(0,1,1e-320)"],
        ["context=shuffle(range(1000000000))"],
        ["context=range(0,10001)"],
        [f"context={','.join(['512'] * 10001)}"],
        ["context=range(1,101)", "protocol.seed=range(0,101)"],
        ["context=range(1,1001)", "protocol.seed=range(0,1000)", "protocol.warmup_steps=range(0,1000)"],
        ["experiment=matrix", "protocol.seed=range(0,900)"],
    ],
    ids=range(11),
)
def test_a_sweep_has_a_number_of_cells_that_somebody_can_want(composer: Composer, overrides: list[str]) -> None:
    start = time.monotonic()
    told = refusal(composer, *overrides, multirun=True)
    assert time.monotonic() - start < 10
    assert re.search(r"\d cells; a sweep has 10000 at most|inf cells", told)


def test_sessions_count(composer: Composer) -> None:
    with pytest.raises(SystemExit, match="2"):
        sweep.prepare(["-m", "model=tiny", "protocol.sessions=1000000000"])


def test_as_many_cells_as_a_sweep_may_have(composer: Composer) -> None:
    assert len(composer.jobs(["protocol.seed=range(0,100)", "context=range(1,101)"], multirun=True)) == MOST
    assert len(composer.jobs(["context=range(0.5,100.5,0.25)"], multirun=True)) == 400


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("context=range(0,10,0)", "a range has finite ends and a step that is not 0"),
        ("context=range(0,1,0.0)", "a range has finite ends and a step that is not 0"),
        ("context=range(0,inf)", "a range has finite ends"),
        ("context=range(nan,1)", "a range has finite ends"),
        ("context=range(1,2,nan)", "a range has finite ends"),
        (f"model.weights={'[' * 2000}{']' * 2000}", "nested too deeply: model.weights=[[["),
        (f"model.weights={'{a:' * 3000}1{'}' * 3000}", "nested too deeply: model.weights={a:"),
        ("context=int(x)", "ValueError while evaluating 'int(x)': invalid literal"),
        ("context=sort(1,a,[2])", "TypeError while evaluating"),
    ],
    ids=range(9),
)
def test_what_hydra_s_grammar_stumbles_over_is_bad_input(composer: Composer, override: str, told: str) -> None:
    message = refusal(composer, override, multirun=True)
    assert told in message
    assert len(message) < 400
