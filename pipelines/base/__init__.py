"""The on-demand pipeline that makes the embedded base model."""
