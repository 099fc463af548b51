"""The commands, one file a subject. Each parses, asks the simulator or the published tables, and hands the answer to a renderer.

Nothing heavy is imported until a command runs.
"""
