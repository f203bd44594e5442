"""Plugins for rfloor that cannot work."""
