"""What every command shares: errors, Ctrl-C, progress, plots."""
