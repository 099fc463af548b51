"""Runs kept, read back and set side by side."""
