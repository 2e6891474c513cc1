"""All stages at once: the pipeline, comparisons, the report, what memory it takes, and what the machine has."""
