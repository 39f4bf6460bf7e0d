"""gRPC: how a scorer or a campaign is reached from elsewhere. Only what is in this folder imports
grpc."""
