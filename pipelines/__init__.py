"""One thin entry per stage of dvc.yaml."""

import sys

if sys.argv[0] == "-m":  # one of them is being started: a signal must find a handler before torch is imported
    from coordexp.infra.signals import leave_on_signals

    leave_on_signals()
