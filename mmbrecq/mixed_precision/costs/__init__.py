"""Cost models: what the bits of every layer cost in bytes, operations or time."""
