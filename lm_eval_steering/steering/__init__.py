"""What is done to them: intervention, plan, attaching to a model."""
