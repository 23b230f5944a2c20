"""Which k, draft length and types are fastest for a pair on this machine."""
