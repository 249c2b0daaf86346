"""What a person reads: text, tables and pictures."""
