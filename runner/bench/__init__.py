"""What speculation gains, measured on this machine: python -m runner.bench."""
