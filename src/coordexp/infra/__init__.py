"""Files, the process, provenance, the device: what every stage needs and no parameter says."""
