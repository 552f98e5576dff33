"""Data: rows from anywhere, as examples, and as tokens; and text that a model writes itself."""
