"""Sampling: llama.cpp's samplers, grammars and schemas, and noise that target and drafter share."""
