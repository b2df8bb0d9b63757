"""Generation: methods that act while samples are drawn."""
