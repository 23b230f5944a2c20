"""The loop: draft, verify, accept, and the engine that keeps a pair together."""
