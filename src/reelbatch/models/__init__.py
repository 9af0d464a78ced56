"""Networks: what they share, and a room for each model of the family."""
