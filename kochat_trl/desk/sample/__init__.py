"""The demo's questions, and a judge that knows the answers."""
