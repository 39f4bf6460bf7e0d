"""Refuse a bad run before it starts, and print the plan: placement, memory, pace."""
