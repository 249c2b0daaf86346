"""Log-likelihoods by the least work: common prefixes run once, the head only where a token is scored."""
