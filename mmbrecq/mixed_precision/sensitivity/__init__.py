"""Sensitivities: what every layer loses at every number of bits, measured after its reconstruction."""
