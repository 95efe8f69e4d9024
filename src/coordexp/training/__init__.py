"""Trainers: stage 1, stage 2 with its channels, schedule and resume."""
