"""A checkpoint and its predictions in the formats of others."""
