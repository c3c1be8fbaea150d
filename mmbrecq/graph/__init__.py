"""Graph preparation: tracing, folding, placement of activation quantizers, cutting into units."""
