"""Snapshots: their format, and the writer that saves them."""
