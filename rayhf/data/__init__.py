"""Data of a campaign: sources, prompts, preference pairs, chat templates."""
