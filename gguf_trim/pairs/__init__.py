"""Pairs by name: the catalog, and what brings one to this machine, trimmed, proven and quick."""
