"""The contract suites that every plugin inherits: subclass one, name the plugin, and that is the test.

    from registry.testing import LinearFormatContract

    class TestInt3(LinearFormatContract):
        plugin = Int3

The suites need pytest and whatever the plugin needs, no accelerator: what can only be seen on a GPU is
marked `gpu` and skipped without one. What a plugin refuses is skipped too, but a plugin that refuses
everything fails. Every number that a test judges by is a class attribute, so a subclass can set it, and
has to say why.
"""

from registry.testing.attention import AttentionKernelContract
from registry.testing.backend import BackendContract
from registry.testing.contract import TINY
from registry.testing.linear import LinearFormatContract

__all__ = ["TINY", "AttentionKernelContract", "BackendContract", "LinearFormatContract"]
