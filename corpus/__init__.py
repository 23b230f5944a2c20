"""Counts which tokens a target really emits."""
