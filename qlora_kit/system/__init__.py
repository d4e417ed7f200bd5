"""The machine: files, devices, the hub's cache, and safe imports of libraries."""
