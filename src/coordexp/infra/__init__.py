"""What every stage needs besides parameters: files, processes, provenance, device."""

# Environment variable: the device of this process and its children (infra/device.py). It is defined here because that
# module loads torch, which most stages do not need.
DEVICE_VARIABLE = "COORDEXP_DEVICE"
# Environment variable: comma-separated trackers that training reports to (training/live.py). It is not a parameter,
# because it changes no output.
TRACK_VARIABLE = "COORDEXP_TRACK"
# Set by DVC in an experiment: the commit that it started from, and its name.
BASELINE_VARIABLE, EXPERIMENT_VARIABLE = "DVC_EXP_BASELINE_REV", "DVC_EXP_NAME"
