"""Files, the process, provenance, the device: what every stage needs and no parameter says."""

# In the environment: where models of this process and of those that it starts compute (infra/device.py). It stands here
# because that module loads torch, which most stages do without.
DEVICE_VARIABLE = "COORDEXP_DEVICE"
# Trackers that a training gives its numbers to (training/live.py), by commas: in no output, so no parameter.
TRACK_VARIABLE = "COORDEXP_TRACK"
# DVC's own: of an experiment, the commit that it started from and its name.
BASELINE_VARIABLE, EXPERIMENT_VARIABLE = "DVC_EXP_BASELINE_REV", "DVC_EXP_NAME"
