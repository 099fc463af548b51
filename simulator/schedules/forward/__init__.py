"""The forward's schedules, siblings: read two side by side and the difference is the idea."""
