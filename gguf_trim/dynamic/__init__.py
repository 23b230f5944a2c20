"""A vocabulary chosen anew at every step: which rows beyond the kept ones, and what makes that choice."""
