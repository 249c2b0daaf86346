"""The demo: a small model that ships, its text, and two plans for it."""
