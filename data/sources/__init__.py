"""Readers of examples, one file a source: each yields records (data/records.py) in the order of its files."""
