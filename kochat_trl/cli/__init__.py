"""The `kochat` command: a file for each group of commands."""
