"""What runs behind the wall: the only package that imports torch. It imports nothing of the daemon."""
