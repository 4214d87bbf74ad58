"""Cases, the runner that times them, and the measurements that are committed."""
