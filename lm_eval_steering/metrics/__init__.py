"""Language identification, language forcing, likelihoods and LSS."""
