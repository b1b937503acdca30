"""Memory, cache and positions for other people's generators."""
