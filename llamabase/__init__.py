"""What the other packages stand on: GGUF files, llama.cpp and ggml, sampling, and what every command shares.

Imports run one way: runner -> gguf_trim -> corpus -> llamabase. The packages meet on files.
"""

__version__ = "0.1.0"
