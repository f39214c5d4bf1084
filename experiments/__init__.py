"""Scripts that remake what the project ships and the tables it prints beside published ones."""
