"""What was learnt and what was forgotten: tasks, perplexity and divergence, with intervals."""
