"""The choice of bits layer by layer: what each choice loses, what it costs, and which one is best."""
