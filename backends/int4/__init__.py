"""Our own int4: how it lies in memory, the product that reads it, and the format that hosts it anywhere."""
