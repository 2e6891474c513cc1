"""`kochat label`: people rank answers, every judgement is kept, and becomes a ranking file."""
