"""The embedded world: scenes of emoji sprites as a COCO folder, and the tiny model that is pretrained on them.

To `coordexp`, which imports nothing from here, it is a data set and a checkpoint like any other.
"""
