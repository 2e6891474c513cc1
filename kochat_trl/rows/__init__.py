"""Records → token ids, through the chat template."""
