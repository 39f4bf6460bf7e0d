"""Ray actors around the engines of rayhf, the clients that make them roles, and supervision."""
