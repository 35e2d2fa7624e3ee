"""Benchmarks: speed of the engine and of what it makes."""
