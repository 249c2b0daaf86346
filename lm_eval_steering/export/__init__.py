"""A static intervention written into weights: a plain checkpoint or a LoRA that any engine runs without us."""
