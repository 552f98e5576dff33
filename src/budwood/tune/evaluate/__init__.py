"""Evaluation of an adapter: tasks, perplexity and divergence from the base, with intervals."""
