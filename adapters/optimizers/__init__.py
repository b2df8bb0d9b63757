"""Memory-efficient optimizers as methods: settings of the split optimizer."""
