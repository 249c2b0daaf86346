"""Plans of the papers' experiments, spelled for the papers' models."""
