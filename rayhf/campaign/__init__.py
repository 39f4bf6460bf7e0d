"""The campaign: the one loop and its durable state, independent of any engine."""
