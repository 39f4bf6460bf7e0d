"""The scorer service: messages, server and client."""
