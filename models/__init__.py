"""Torch only: networks, losses, metrics, weights, fitting. No geography, no chunks."""
