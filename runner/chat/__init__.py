"""python -m runner.chat."""
