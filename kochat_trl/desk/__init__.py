"""The desk: what people work with around training. Nothing in the training wing imports it."""
