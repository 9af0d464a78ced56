"""Training of the transformer: what is learnt (the loss), apart from what it is learnt from."""
