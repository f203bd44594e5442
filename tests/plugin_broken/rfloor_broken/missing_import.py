"""A module that imports at its top what it should only require."""

import rfloor_absent_package  # noqa: F401
