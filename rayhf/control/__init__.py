"""The operator's access to a campaign: status, commands and labels, over files or gRPC."""
