"""Prompts and preference pairs: sources, readers, chat templates."""
