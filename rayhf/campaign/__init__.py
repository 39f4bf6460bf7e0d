"""The campaign: the one loop, its durable state, and nothing that knows an engine."""
