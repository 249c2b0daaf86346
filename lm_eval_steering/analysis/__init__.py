"""What a user finds out about a model of their own: does steering work in it, and what does it do inside."""
