"""What a trimmed drafter is on disk: all that making one and drafting with one both read."""
