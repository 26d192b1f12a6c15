"""Scalar expressions: traced from torch, differentiated by torch, printed for every backend from one graph."""
