from rfloor_example.int8 import Int8Rowwise

from registry.testing import LinearFormatContract


class TestInt8Rowwise(LinearFormatContract):
    plugin = Int8Rowwise
