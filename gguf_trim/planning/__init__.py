"""Which k, and how many drafts, are the fastest on this machine: judged on the target's own answers."""
