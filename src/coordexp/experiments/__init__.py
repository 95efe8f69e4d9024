"""A/B tests over the stage graph: plan the arms, run them as DVC experiments, judge them, write the report."""
