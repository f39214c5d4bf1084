"""What every target that is measured needs: timings kept on disk, and trusted although the machine may be busy."""
