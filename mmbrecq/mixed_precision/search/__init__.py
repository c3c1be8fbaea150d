"""The choice of bits: the problem as tables, and the searchers that solve it."""
