"""Fitting a speculator to what a drafter makes of answers."""
