"""Making a plan's stages in other processes: what is ready, where it runs, and what a lost worker costs."""
