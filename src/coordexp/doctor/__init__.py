"""What is wrong with data, model and plan, said before anything trains."""
