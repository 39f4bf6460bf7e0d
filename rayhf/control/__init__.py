"""What an operator does to a campaign: status, commands and labels, over files or gRPC."""
