"""The messages (*.proto) and what protoc makes of them (`make proto`)."""
