"""Prunability (Kuhn et al. 2021)."""
