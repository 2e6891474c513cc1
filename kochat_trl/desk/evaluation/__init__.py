"""How far to trust a reward model."""
