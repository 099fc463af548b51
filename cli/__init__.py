"""The terminal: parses and renders, computes nothing."""
