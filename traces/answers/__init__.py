"""Answers: questions about many predictions, each answered by a sentence and the table behind it."""
