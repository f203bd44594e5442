"""A sound plugin whose package is on no machine."""

from registry.api import LinearFormat, Requirement


class Format(LinearFormat):
    """Never gets as far as to convert anything."""

    requires = (Requirement("rfloor-absent-package>=1", "pip install ./rfloor-absent-package"),)

    def convert(self, linear):
        """See `LinearFormat.convert`."""
        raise AssertionError("converted without the package that it requires")

    def dequantize(self, module):
        """See `LinearFormat.dequantize`."""
        raise AssertionError("dequantised without the package that it requires")
