"""Environments: classes that answer the policy over several turns, in processes of their own."""
