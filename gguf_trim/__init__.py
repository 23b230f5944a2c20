"""Cuts the output head of a drafter's GGUF to the tokens that matter, and proves that nothing else changed."""
