"""The files of runs: what is in them, how they are read without trust and written without loss."""
