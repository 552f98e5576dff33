"""Training an adapter in a folder: settings, the Trainer, its losses, and validation."""
