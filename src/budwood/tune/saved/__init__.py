"""Saved adapters: their files, their card, loading them, and putting them on the hub."""
