"""A pretrained vision-language model as an open-vocabulary object detector, and the instrument to judge it."""

__version__ = "0.1.0"
