"""The demo: a small model that ships, its text, and what `lm-eval-steering demo` does with them."""
