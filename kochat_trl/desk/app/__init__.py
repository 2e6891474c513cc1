"""`kochat app`: a page on this machine, to rank answers, to talk with the models, and to watch runs."""
