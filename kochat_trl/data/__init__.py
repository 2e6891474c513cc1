"""Files → records, checked, with the file, line and field of what is wrong. Imports no torch."""
