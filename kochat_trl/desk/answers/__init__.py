"""A model's answers: decoding, chat, and what is said of them without a model."""
