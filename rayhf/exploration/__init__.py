"""Exploration: many coroutines over engines that batch, their two schedulers, and the journal."""
