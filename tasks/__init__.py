"""The work of one tile or block: arrays and small values in and out. No dask, no YAML, no click."""
