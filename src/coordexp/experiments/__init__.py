"""A/B tests over the stage graph: plan the arms, run them as DVC experiments, evaluate them, write the report."""
