"""The embedded world: scenes of emoji sprites as a COCO folder, and the tiny model that is pretrained on them.

`coordexp` imports nothing from here and treats both as an ordinary data set and checkpoint.
"""
