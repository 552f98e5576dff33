"""Naming objects made of a few dozen points."""
