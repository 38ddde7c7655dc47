"""Parts that layers are made of: projections, norms, convolutions, gates, caches."""
