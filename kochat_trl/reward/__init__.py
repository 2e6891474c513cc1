"""The reward model: its losses, its trainer, and the scores that it gives."""
