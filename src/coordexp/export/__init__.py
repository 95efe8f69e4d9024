"""Export of a checkpoint and its predictions in standard formats."""
