"""Devices: chips as data, one TOML file each, every figure with its unit and source."""
