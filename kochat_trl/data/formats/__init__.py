"""What a file is, told from what is in it, and its records as bytes have them."""
