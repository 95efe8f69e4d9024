"""Files, the process, provenance, the device: what every stage needs and no parameter says."""

# In the environment: where models of this process and of those that it starts compute (infra/device.py). It stands here
# because that module loads torch, which most stages do without.
DEVICE_VARIABLE = "COORDEXP_DEVICE"
