"""Many coroutines over engines that batch: the request scheduler and the journal."""
