"""Readers of other people's annotations and predictions, for the evaluator; without our models, without torch."""
