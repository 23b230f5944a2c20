"""Counts which tokens a target really emits, and holds what the other packages share about GGUF files.

Imports run one way: runner -> gguf_trim -> corpus. Packages meet on files.
"""

__version__ = "0.1.0"
