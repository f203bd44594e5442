"""Example plugins for rfloor."""
