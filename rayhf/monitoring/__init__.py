"""Guards, audit and observers of a running campaign."""
