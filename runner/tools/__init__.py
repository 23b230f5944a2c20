"""Calls of tools: how models write them, and grammars that force them."""
