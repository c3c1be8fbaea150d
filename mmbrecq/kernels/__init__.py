"""Compiled arithmetic of an iteration, where there is a C compiler."""
