"""Upcycling: a sparse mixture of experts from a dense model, with the same outputs."""
