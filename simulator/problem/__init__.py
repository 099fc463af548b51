"""Problem: what is asked. The workload, the tile that cuts it, the order in which CTAs take the tiles."""
