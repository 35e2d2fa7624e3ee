"""Slimmable Pruned Networks against slimmable and individually trained networks."""
