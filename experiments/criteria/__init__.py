"""Criteria: which scores find the units that matter."""
