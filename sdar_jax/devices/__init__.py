"""Devices: what chips can do, the processes of a job, meshes. Nothing here knows a model."""
