"""What the contract suites share: how a plugin is configured, where it runs, what every plugin declares."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pytest
from packaging.requirements import InvalidRequirement
from packaging.requirements import Requirement as Specifier

from registry.api import (
    Architecture,
    Plugin,
    Request,
    Requirement,
)
from registry.validate import CACHES, EXECUTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping


TINY = Architecture(
    name="tiny",
    model_type="qwen2",
    layers=3,
    hidden=128,
    q_heads=4,
    kv_heads=2,
    head_dim=32,
    ffn=256,
    vocab=1024,
    max_context=4096,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    qkv_bias=True,
    tied_embeddings=False,
)
"""Small enough for a CPU, with every part of the real ones: grouped heads, biases, a head of its own."""

DEVICES = ("cpu", "cuda")

Test = TypeVar("Test", bound="Callable[..., None]")


def gpu(test: Test) -> Test:
    """Mark a test `gpu`, so that `-m "not gpu"` leaves it out; it skips itself without CUDA anyway.

    A project that has not registered the marker gets the test without it: under `--strict-markers` an
    unknown marker would keep the whole module from being collected.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
        try:
            marked: Test = pytest.mark.gpu(test)
        except pytest.fail.Exception:
            return test
    return marked


class Contract:
    """What the suites share: how a plugin is configured, where it runs, and what every plugin declares.

    Class attributes:
        plugin: The class under test.
        options: Values of its `Options` that differ from their defaults.
        name: The name it is announced under, which the other plugins' `check` may ask about.
        device: `cpu` or `cuda`; `None` takes CUDA where there is some and the plugin runs there.
        dtype: Name of the torch dtype of activations and cache.
        architecture: The model.
        cosine: Least cosine similarity between what the plugin computes and what a reference does.
        relative_error: Largest difference to a reference of the same weights, over the reference's largest
            element. Rounding to bf16 alone costs 0.004.
    """

    kind: ClassVar[type[Plugin]]
    plugin: ClassVar[Any]
    options: ClassVar[Mapping[str, Any]] = {}
    name: ClassVar[str] = "plugin-under-test"
    device: ClassVar[str | None] = None
    dtype: ClassVar[str] = "bfloat16"
    architecture: ClassVar[Architecture] = TINY
    cosine: ClassVar[float] = 0.999
    relative_error: ClassVar[float] = 0.02

    def place(self) -> str:
        """The device to test on; skips the test where the plugin cannot run at all."""
        import torch

        skip_without(self.plugin)
        if self.device is not None:
            device = self.device
        else:
            device = "cuda" if torch.cuda.is_available() and "cuda" in self.plugin.devices else "cpu"
        if device not in self.plugin.devices or (device == "cuda" and not torch.cuda.is_available()):
            pytest.skip(f"{self.plugin.__name__} runs on {', '.join(self.plugin.devices)}, not here")
        least = self.plugin.min_capability
        if device == "cuda" and least is not None and torch.cuda.get_device_capability() < least:
            pytest.skip(f"{self.plugin.__name__} needs compute capability {least}")
        return device

    def place_on_gpu(self) -> str:
        """`cuda`; skips the test where the plugin does not run there."""
        device = self.place()
        if device != "cuda":
            pytest.skip("needs a CUDA device")
        return device

    def torch_dtype(self) -> Any:
        """`dtype` as torch has it."""
        import torch

        return getattr(torch, self.dtype)

    def request(self, device: str, **changes: Any) -> Request:
        """What `check` is asked: this plugin at batch 1, eager, beside rfloor's defaults."""
        import torch

        asked = Request(
            architecture=self.architecture,
            backend="hf",
            quant="none",
            attention="sdpa",
            execution="eager",
            cache="dynamic",
            batch_size=1,
            capacity=64,
            device=device,
            capability=torch.cuda.get_device_capability() if device == "cuda" else None,
            options=self.plugin.Options(**self.options),
            quant_options=None,
            attention_options=None,
        )
        return replace(asked, **changes)

    def test_class_is_a_complete_plugin(self) -> None:
        """A concrete subclass of its kind; what is abstract in `registry.api` is there."""
        assert issubclass(self.plugin, self.kind), f"{self.plugin.__name__} is no {self.kind.__name__}"
        missing = sorted(getattr(self.plugin, "__abstractmethods__", ()))
        assert not inspect.isabstract(self.plugin), f"{self.plugin.__name__} lacks {', '.join(missing)}"

    def test_requirements_can_be_read(self) -> None:
        """Each is a `Requirement` whose package pip could parse, with a command that brings it."""
        for requirement in self.plugin.requires:
            assert isinstance(requirement, Requirement), f"requires holds {requirement!r}, which is no Requirement"
            try:
                Specifier(requirement.package)
            except InvalidRequirement as error:
                raise AssertionError(f"requires: {requirement.package!r} is no package: {error}") from error
            assert requirement.install.strip(), f"{requirement.package} comes without the command that installs it"

    def test_declarations_are_known_and_consistent(self) -> None:
        """Devices, caches and executions are the known ones, and a graph has what it takes to be captured."""
        plugin = self.plugin
        for declared, known in (("devices", DEVICES), ("caches", CACHES), ("executions", EXECUTIONS)):
            values = getattr(plugin, declared)
            assert isinstance(values, tuple), f"{declared} is {values!r}; it has to be a tuple of names"
            assert values, f"{declared} is empty, so no cell can ever use the plugin"
            assert set(values) <= set(known), f"{declared} is {values}; known: {', '.join(known)}"
        assert "eager" in plugin.executions, "executions lacks eager, the mode in which a step is checked first"
        if "cuda_graph" in plugin.executions:
            assert "static" in plugin.caches, "cuda_graph is declared, but a graph needs a static cache"
            assert "cuda" in plugin.devices, "cuda_graph is declared, but CUDA is not among the devices"

    def test_min_capability_is_a_version(self) -> None:
        """`None`, or major and minor of a CUDA compute capability."""
        least = self.plugin.min_capability
        if least is not None:
            assert isinstance(least, tuple), f"min_capability is {least!r}; (8, 0) is the form"
            assert [type(part) for part in least] == [int, int], f"min_capability is {least!r}; (8, 0) is the form"
            assert "cuda" in self.plugin.devices, "min_capability is given, but CUDA is not among the devices"

    def test_options_have_defaults(self) -> None:
        """`Options` is a dataclass with nothing to fill in: a plugin is selectable by its name alone."""
        options = self.plugin.Options
        assert isinstance(options, type), f"Options is {options!r}, which is no class"
        assert dataclasses.is_dataclass(options), f"Options is {options!r}, which is no dataclass"
        unset = [
            field.name
            for field in dataclasses.fields(options)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        ]
        assert not unset, f"options without a default: {', '.join(unset)}"

    def test_import_is_light(self) -> None:
        """Importing the module brings neither torch nor the packages that the plugin requires.

        The declarations are read before a missing package can be told, in a process that never needs torch.
        """
        heavy = ["torch", "transformers", *_modules_of(self.plugin.requires)]
        probe = (
            "import importlib, sys\n"
            "importlib.import_module(sys.argv[1])\n"
            "print(*[name for name in sys.argv[2:] if name in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-P", "-c", probe, self.plugin.__module__, *heavy],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{self.plugin.__module__} cannot be imported by itself:\n{done.stderr}"
        brought = done.stdout.split()
        assert not brought, f"importing {self.plugin.__module__} imports {', '.join(brought)} as well"


def _modules_of(requires: Iterable[Requirement]) -> list[str]:
    """Import names of the required packages, as far as they are installed."""
    wanted = {_canonical(Specifier(requirement.package).name) for requirement in requires}
    if not wanted:
        return []
    modules = importlib.metadata.packages_distributions().items()
    return sorted(module for module, owners in modules if wanted & {_canonical(owner) for owner in owners})


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def skip_without(plugin: Any) -> None:
    """Skip the test if a package that `plugin` requires is not installed in the version that it wants."""
    for requirement in plugin.requires:
        wanted = Specifier(requirement.package)
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{plugin.__name__} needs {requirement.package}: {requirement.install}")
        if not wanted.specifier.contains(found, prereleases=True):
            pytest.skip(f"{plugin.__name__} needs {requirement.package}, found {found}: {requirement.install}")
