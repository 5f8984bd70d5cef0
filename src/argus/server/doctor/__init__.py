"""Checks of a machine and of settings before a server is started with them (`argus doctor`).

Nothing is changed but for probes, which are removed: no table is made, nothing is downloaded.
"""
