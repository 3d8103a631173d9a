"""Weights on the compute device while a layer runs."""
