"""Speculative decoding on llama.cpp: a target, a drafter, and the loop that keeps the output exactly the target's."""
