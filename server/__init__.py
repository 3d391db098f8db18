"""The HTTP side: settings, registry, middleware, routes. Knows no training, and the engine only by a protocol."""
