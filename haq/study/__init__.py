"""One job on disk: what is asked, the search or sweep itself, and what comes of it."""
