"""One of each kind that haq finds by name."""
