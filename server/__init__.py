"""The HTTP side: settings, registry, middleware, routes. Knows nothing of training."""
