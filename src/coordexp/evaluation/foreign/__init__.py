"""Annotations and predictions of anybody, as the evaluator reads them: no model of ours, no torch."""
