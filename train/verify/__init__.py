"""`launch.py verify`: whether the devices at hand compute what they should, and how fast."""
