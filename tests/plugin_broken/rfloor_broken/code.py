"""A module whose own code fails."""

raise RuntimeError("broken on purpose")
