"""gRPC as transport: shared messages, server, client and credentials, for any service."""
