"""Who evaluates policies beside the first process: processes of this machine, or a Ray cluster."""
