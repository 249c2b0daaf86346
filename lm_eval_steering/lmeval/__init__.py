"""What lm-eval sees: the model, the tasks' Python parts, the registration."""
