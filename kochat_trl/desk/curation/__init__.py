"""`kochat data`: what is wrong with data files, cleaning them, and making new ones."""
