"""What a network costs (`costs`) and what its gates do (`gates`)."""
