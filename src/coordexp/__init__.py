"""A pretrained vision-language model as an open-vocabulary object detector, and the instrument to judge it."""

from coordexp.config.threads import bound_spinning

bound_spinning()  # before anything imports torch

__version__ = "0.1.0"
