"""What a run leaves behind: outputs, model cards, merged models."""
