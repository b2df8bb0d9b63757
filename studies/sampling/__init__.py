"""What is tried: samplers and pruners by name, a space as they see it, what is known already."""
