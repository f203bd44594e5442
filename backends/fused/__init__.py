"""A decode step of our own, fused around its products: see `backends.fused.body`."""
