"""Code: what a warp executes between two points of a schedule's order, as instructions by pipe."""
