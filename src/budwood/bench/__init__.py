"""Benchmarks: how the numbers in the documentation are measured.

The product packages (``prune``, ``tune``, ``points``) never import this one.
"""
