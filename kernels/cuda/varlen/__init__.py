"""The forward on sequences packed one behind another: the schedules' own .cu files under another scheduler of tiles."""
