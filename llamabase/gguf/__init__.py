"""GGUF files: reading, writing, vocabularies. Needs no llama.cpp."""
