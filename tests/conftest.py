"""What several test files share."""

import os

# Nothing here may wait for a network: a hub id is found in a cache or not at all.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import settings

from registry.architecture import Architecture
from registry.compose import Composer
from registry.plugins import Catalog

# The example plugin is a distribution of its own, whose tests run in its own environment.
collect_ignore_glob = ["plugin_*/*"]

settings.register_profile("rfloor", deadline=None)
settings.load_profile("rfloor")


@pytest.fixture(scope="session")
def composer() -> Composer:
    """Composes cells from conf/ and the installed plugins."""
    return Composer(Catalog())


@pytest.fixture(scope="session")
def architecture(composer: Composer) -> Architecture:
    """The tiny model of conf/model."""
    return Architecture.of(composer.cell(["model=tiny"]).model)
