"""Thin entry points, one per stage of dvc.yaml."""

import sys

if sys.argv[0] == "-m":  # a stage is starting: install the signal handlers before the slow import of torch
    from coordexp.infra.signals import leave_on_signals

    leave_on_signals()
