"""Drafting: contracts, drafters, rows chosen at every step, what drafts cost and bring."""
