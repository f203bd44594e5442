from rfloor_example.plain import PlainBackend

from registry.testing import BackendContract


class TestPlain(BackendContract):
    plugin = PlainBackend
