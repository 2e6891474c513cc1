"""YAML and flags → typed arguments, and what is refused before anything is loaded."""
