"""Tokenizer and chat template; bases, quantization, LoRA, and heads."""
