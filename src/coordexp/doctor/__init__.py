"""Checks of data, model and plan before training, and estimates of memory and time."""
