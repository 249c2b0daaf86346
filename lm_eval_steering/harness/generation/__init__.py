"""Generated texts of lm-eval's `hf`, by less work, and their languages."""
