"""Compiled arithmetic of a training step, where there is a C compiler."""
