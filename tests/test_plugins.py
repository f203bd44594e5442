"""Plugins by name: found without an import, imported on use, and every failure the outcome of one cell."""

import copy
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

from registry.api import AttentionKernel, Backend, Quant
from registry.compose import CONF, Composer
from registry.outcome import BadInput, Outcome, Refused
from registry.plugins import CONF_GROUP, KINDS, Catalog

ROOT = CONF.parent
BASES = {"backend": Backend, "quant": Quant, "attention": AttentionKernel}
ANNOUNCED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
OPTIONS = {(file.parent.name, file.stem) for file in CONF.glob("*/*.yaml")} | {
    (kind, name) for kind, group in KINDS.items() for name in ANNOUNCED[group]
}


def distribution(site: Path, name: str, entries: dict[str, dict[str, str]]) -> list[EntryPoint]:
    """Write what pip leaves behind of an installed distribution, and read its entry points."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in e.items()) for group, e in entries.items()]
    (info / "entry_points.txt").write_text("\n\n".join(lines))
    [found] = importlib.metadata.distributions(path=[str(site)], name=name)
    return list(found.entry_points)


def quant(**plugins: str) -> dict[str, dict[str, str]]:
    return {KINDS["quant"]: plugins}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path; what is imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


# By name


def test_names_are_sorted_and_of_one_kind(tmp_path: Path) -> None:
    entries = {KINDS["quant"]: {"q2": "m:B", "q1": "m:A"}, KINDS["backend"]: {"body": "m:C"}, "others": {"x": "m:D"}}
    catalog = Catalog(distribution(tmp_path, "one", entries))
    assert {kind: catalog.names(kind) for kind in KINDS} == {
        "backend": ["body"],
        "quant": ["q1", "q2"],
        "attention": [],
    }


def test_an_unknown_name_is_bad_input_with_the_nearest(tmp_path: Path) -> None:
    catalog = Catalog(distribution(tmp_path, "one", quant(marlin="m:A", awq="m:B")))
    for ask in (catalog.find, catalog.load):
        with pytest.raises(
            BadInput, match=r"no quant plugin is called 'marlim': did you mean marlin\? Known: awq, marlin"
        ):
            ask("quant", "marlim")


def test_the_same_name_may_be_of_two_kinds(tmp_path: Path) -> None:
    entries = {KINDS["quant"]: {"same": "m:A"}, KINDS["attention"]: {"same": "m:B"}}
    catalog = Catalog(distribution(tmp_path, "one", entries))
    assert [catalog.find(kind, "same").target for kind in ("quant", "attention")] == ["m:A", "m:B"]


def test_a_name_that_two_distributions_claim_is_refused_and_no_other_is(tmp_path: Path) -> None:
    first = distribution(tmp_path, "first", quant(both="a:A", mine="a:B"))
    second = distribution(tmp_path, "second", quant(both="b:A", yours="b:B"))
    catalog = Catalog([*second, *first])
    with pytest.raises(Refused) as caught:
        catalog.load("quant", "both")
    refusal = caught.value.refusal
    assert refusal.outcome is Outcome.MISSING_DEPENDENCY
    assert "first and by second" in refusal.reason
    assert refusal.remedy == "Keep one: pip uninstall second"
    assert catalog.names("quant") == ["both", "mine", "yours"]
    assert catalog.find("quant", "mine").distribution == "first"
    assert catalog.find("quant", "yours").distribution == "second"


def test_one_distribution_that_is_found_twice_is_no_conflict(tmp_path: Path) -> None:
    """A checkout that is installed and on the path announces itself twice."""
    entries = [distribution(tmp_path / place, "one", quant(mine="a:A")) for place in ("site", "checkout")]
    catalog = Catalog([*entries[0], *entries[1]])
    assert catalog.find("quant", "mine").target == "a:A"
    assert len(catalog.claims) == 1


# Imported on use

MODULES = {
    "good": "class Plugin: pass",
    "needy": "import no_such_package_anywhere\nclass Plugin: pass",
    "empty": "",
    "function": "def Plugin(): pass",
    "raising": "raise ValueError('at import')",
    "leaving": "raise SystemExit(3)",
    "unparsable": "class Plugin(:",
}


@pytest.fixture
def catalog(site: Path) -> Catalog:
    for name, text in MODULES.items():
        (site / f"made_up_{name}.py").write_text(text)
    names = [*MODULES, "absent"]
    return Catalog(distribution(site, "made-up", quant(**{name: f"made_up_{name}:Plugin" for name in names})))


def test_a_plugin_loads(catalog: Catalog) -> None:
    assert catalog.load("quant", "good") is sys.modules["made_up_good"].Plugin


@pytest.mark.parametrize(
    ("name", "outcome", "told"),
    [
        ("absent", Outcome.MISSING_DEPENDENCY, "No module named 'made_up_absent'"),
        ("needy", Outcome.MISSING_DEPENDENCY, "No module named 'no_such_package_anywhere'"),
        ("empty", Outcome.MISSING_DEPENDENCY, "made_up_empty has no 'Plugin'"),
        ("function", Outcome.MISSING_DEPENDENCY, "made_up_function:Plugin is no class"),
        ("raising", Outcome.CRASH, "raised ValueError: at import"),
        ("leaving", Outcome.CRASH, "raised SystemExit: 3"),
        ("unparsable", Outcome.CRASH, "raised SyntaxError"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_cell_s_outcome(
    catalog: Catalog, name: str, outcome: Outcome, told: str
) -> None:
    with pytest.raises(Refused) as caught:
        catalog.load("quant", name)
    refusal = caught.value.refusal
    assert refusal.outcome is outcome
    assert told in refusal.reason
    assert f"quant plugin {name!r} of made-up" in refusal.reason
    assert re.search(r"pip (install|uninstall) .*made-up", refusal.remedy)
    assert catalog.load("quant", "good").__name__ == "Plugin"


def test_discovery_imports_nothing(catalog: Catalog) -> None:
    before = set(sys.modules)
    assert catalog.names("quant") == sorted([*MODULES, "absent"])
    assert [catalog.find("quant", name).name for name in MODULES] == list(MODULES)
    assert set(sys.modules) == before


# The plugins' own YAML


def package(site: Path, name: str, files: dict[str, str]) -> None:
    """A package that cannot be imported, so that an import shows."""
    for file, text in {"__init__.py": "raise RuntimeError('imported')", **files}.items():
        (site / name / file).parent.mkdir(parents=True, exist_ok=True)
        (site / name / file).write_text(text)


def test_a_yaml_folder_is_found_without_an_import(site: Path) -> None:
    package(site, "made_up_package", {"conf/quant/x.yaml": "name: x", "deep/er/quant/y.yaml": "name: y"})
    (site / "made_up_file.py").write_text("raise RuntimeError('imported')")
    values = ["made_up_package.conf", "made_up_package.deep.er", "made_up_package.conf"]
    values += ["made_up_package.gone", "made_up_absent.conf", "made_up_file.conf"]
    entries = {CONF_GROUP: {f"c{i}": value for i, value in enumerate(values)}}
    before = set(sys.modules)
    folders = Catalog(distribution(site, "made-up", entries)).conf_folders()
    assert folders == [site / "made_up_package" / "conf", site / "made_up_package" / "deep" / "er"]
    assert set(sys.modules) == before


@pytest.fixture
def stranger(site: Path, composer: Composer, monkeypatch: pytest.MonkeyPatch) -> Composer:
    """A composer in an environment with one more distribution, whose package cannot be imported."""
    files = {
        "conf/quant/strange-b.yaml": "name: strange-b\nplugin: strange-a\nstudy_bits: 4\noptions: {group: 64}",
        "conf/quant/nf4.yaml": "name: nf4\nstudy_bits: 1",
    }
    package(site, "made_up_stranger", files)
    entries = quant(**{"strange-a": "made_up_stranger.a:A"}) | {CONF_GROUP: {"made-up": "made_up_stranger.conf"}}
    distribution(site, "stranger", entries)
    store = ConfigStore.instance()  # filled by Hydra itself when `composer` was made
    monkeypatch.setattr(store, "repo", copy.deepcopy(store.repo))
    return Composer(Catalog())


def test_a_plugin_without_yaml_is_an_option(stranger: Composer) -> None:
    quant = stranger.cell(["quant=strange-a", "+quant.options.bits=3"]).quant
    assert (quant.name, quant.plugin, quant.options) == ("strange-a", "strange-a", {"bits": 3})


def test_a_plugin_s_yaml_is_an_option(stranger: Composer) -> None:
    quant = stranger.cell(["quant=strange-b"]).quant
    assert (quant.plugin, quant.study_bits, quant.options) == ("strange-a", 4, {"group": 64})
    with pytest.raises(BadInput, match="did you mean strange-"):
        stranger.jobs(["quant=strange-c"], multirun=False)


def test_a_plugin_s_yaml_cannot_stand_for_rfloor_s_own(stranger: Composer, composer: Composer) -> None:
    assert stranger.cell(["quant=nf4"]) == composer.cell(["quant=nf4"])


# What rfloor itself announces


@pytest.mark.parametrize(("kind", "name"), [(kind, n) for kind, group in KINDS.items() for n in ANNOUNCED[group]])
def test_every_announced_plugin_loads(kind: str, name: str) -> None:
    plugin = Catalog().load(kind, name)
    assert issubclass(plugin, BASES[kind])
    assert not getattr(plugin, "__abstractmethods__", None)


def test_loading_every_plugin_imports_nothing_heavy() -> None:
    """What a class declares is read before torch is there."""
    code = (
        "import sys; from registry.plugins import KINDS, Catalog; catalog = Catalog()\n"
        "for kind in KINDS:\n"
        "    for name in catalog.names(kind): catalog.load(kind, name)\n"
        "print(sorted({'torch', 'transformers', 'bitsandbytes', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_pyproject_announces_in_known_groups_only() -> None:
    assert set(ANNOUNCED) <= {*KINDS.values(), CONF_GROUP}


@pytest.mark.parametrize(("group", "option"), sorted(OPTIONS))
def test_every_option_is_in_the_readme(group: str, option: str) -> None:
    spans = set(re.findall(r"`([^`\n]+)`", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert spans & {option, f"{group}={option}"}, f"README.md names no `{option}` of the group {group}"


@pytest.mark.parametrize("group", sorted({group for group, _ in OPTIONS}))
def test_every_group_is_in_the_readme(group: str) -> None:
    assert f"`{group}`" in (ROOT / "README.md").read_text(encoding="utf-8")
