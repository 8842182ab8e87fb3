"""What came out? The report of a run."""
