"""Where it runs: Ray actors, thin shells around the engines of rayhf, and the clients that make
them look like roles."""
