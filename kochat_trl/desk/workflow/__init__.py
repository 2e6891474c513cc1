"""All stages at once: the pipeline, comparisons, the report, and what memory it takes."""
